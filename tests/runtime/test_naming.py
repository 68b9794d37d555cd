"""Run folders do not collide."""

from recombine.runtime.naming import run_folder, run_name


def test_run_folders_do_not_collide():
    assert run_name("method.energy=0.9") != run_name("method.energy=0.95") and run_name("") == "default"
    long = [run_name("x=" + "1" * 200 + end) for end in "ab"]
    assert long[0] != long[1] and max(map(len, long)) <= 120
    assert "/" not in run_name("data.root=/a/b") and run_name("data.root=a/b") != run_name("data.root=a_b")
    assert run_folder(["b=1", "a=2"]) == run_folder(["a=2", "b=1", "experiment=x", "logger.mode=offline", "+only=[a]"])
