"""A checkpoint from elsewhere is data: it loads, or it is refused in one line, and it never runs code."""

import copy
import json
import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

import recombine
from recombine import models
from recombine.runtime import tensor_file

SIZES = {"image_size": 16, "patch_size": 8, "embed_dim": 24, "depth": 1, "num_heads": 2, "num_classes": 3}
HOSTILE = [
    None, True, -1, 0, 7, 1.5, 10**9, 10**30, 1e300, "", "os.system", "file:///etc/passwd", "../../x", "x" * 5000,
    [], {}, [1], {"a": 1}, [[[[[[[[[[[[1]]]]]]]]]]]], {"_target_": "os.system"}, ["a", {"b": []}],
]  # fmt: skip


def fresh():
    torch.manual_seed(0)
    return models.build("tiny_vit", arch="vit_tiny_patch16_224", pretrained=False, **SIZES)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """(metadata, tensors) of a difference and of a whole file, with two methods in each."""
    folder = tmp_path_factory.mktemp("files")
    model = recombine.apply(recombine.apply(fresh(), recombine.Svd(ratio=0.5)), recombine.Peft())
    paths = [recombine.save(model, folder / str(whole), whole=whole) for whole in (False, True)]
    return folder, [tensor_file.read(path) for path in paths]


def places(value, path=()):
    """Every place in nested lists and dicts, as the keys that lead there."""
    keys = value.keys() if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ()
    return [path, *(place for key in keys for place in places(value[key], (*path, key)))]


def mutated(meta, choose):
    """The metadata with one place replaced, dropped, doubled or renamed."""
    meta = copy.deepcopy(meta)
    path = choose([place for place in places(meta)[1:] if place[-1] != "pretrained"])  # that would ask the hub
    owner = meta
    for key in path[:-1]:
        owner = owner[key]
    how = choose(["replace", "replace", "drop", "double", "rename"])
    if how == "replace":
        owner[path[-1]] = choose(HOSTILE)
    elif how == "drop":
        del owner[path[-1]]
    elif isinstance(owner, list):
        owner.append(copy.deepcopy(owner[path[-1]]))
    else:
        owner[choose(["checkpoint_path", "norm_layer", "auto_map", "rank", "a.b", "__class__"])] = owner[path[-1]]
    return meta


@settings(max_examples=60, deadline=None, derandomize=True)
@given(data=st.data())
def test_mutated_metadata_load_or_are_refused(files, data):
    folder, both = files
    meta, tensors = data.draw(st.sampled_from(both))
    changed = mutated(meta, lambda among: data.draw(st.sampled_from(among)))
    given_model = fresh() if data.draw(st.booleans()) else None
    tensor_file.write(folder / "mutated", tensors, changed)
    try:
        loaded = recombine.load(folder / "mutated", given_model)
    except recombine.UsageError as error:
        assert "\n" not in str(error) and str(folder / "mutated") in str(error)
        if given_model is not None:  # as it was
            new = fresh()
            assert not hasattr(given_model, "recombined") and repr(given_model) == repr(new)
            assert all(torch.equal(a, b) for a, b in zip(given_model.parameters(), new.parameters(), strict=True))
            assert all(p.requires_grad for p in given_model.parameters())
    else:
        assert loaded.eval()(torch.zeros(1, 3, 16, 16)).isfinite().all()


@pytest.mark.parametrize("text", ["[1]", "5", "null", '"x"', '{"format": 2}', '{"format": NaN}', "[" * 10**5, "{"])
def test_metadata_of_another_shape(files, text, tmp_path):
    _, ((_, tensors), _) = files
    save_file({name: tensor.clone() for name, tensor in tensors.items()}, tmp_path / "m", {"recombine": text})
    with pytest.raises(recombine.UsageError) as error:
        recombine.load(tmp_path / "m")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("key", ["checkpoint_path", "pretrained_cfg", "pretrained_cfg_overlay", "norm_layer", "file"])
def test_what_could_run_code_reaches_no_timm(files, key, tmp_path):
    _, ((difference, tensors), (whole, everything)) = files
    tensor_file.write(tmp_path / "m", tensors, difference | {"source": difference["source"] | {key: "evil.pt"}})
    tensor_file.write(tmp_path / "w", everything, whole | {"architecture": whole["architecture"] | {key: "evil.pt"}})
    for path in (tmp_path / "m", tmp_path / "w"):
        with pytest.raises(recombine.UsageError, match=f"model.{key}='evil.pt': no size of a timm model"):
            recombine.load(path)
    with pytest.raises(recombine.UsageError, match=f"model.{key}='evil.pt'"):
        models.build("tiny_vit", arch="vit_tiny_patch16_224", pretrained=False, **SIZES, **{key: "evil.pt"})


@pytest.mark.parametrize("name, config, word", [
    ("LlamaForCausalLM", {"auto_map": "x"}, "no such key"),
    ("LlamaForCausalLM", {"_name_or_path": "x/y"}, "malformed|no such key"),
    ("LlamaForCausalLM", {"hidden_act": "a/b"}, "no plain value"),
    ("LlamaForCausalLM", {"num_hidden_layers": 10**6}, "too large"),
    ("pipeline", {}, "no model of the class"),
    ("Trainer", {}, "no model of the class"),
    ("PreTrainedModel", {}, "no model of the class"),
])  # fmt: skip
def test_what_could_run_code_reaches_no_transformers(files, name, config, word, tmp_path):
    _, (_, (meta, tensors)) = files
    architecture = {"library": "transformers", "class": name, "attention": "sdpa", "config": config}
    tensor_file.write(tmp_path / "m", tensors, meta | {"architecture": architecture})
    with pytest.raises(recombine.UsageError, match=word):
        recombine.load(tmp_path / "m")


@pytest.mark.parametrize("fields, word", [
    ({"config": "PeftModel"}, "has no such class"),
    ({"config": "os"}, "has no such class"),
    ({"options": {"megatron_core": "os", "megatron_config": {}}}, "names code or files"),
])  # fmt: skip
def test_what_could_run_code_reaches_no_peft(files, fields, word, tmp_path):
    _, ((meta, tensors), _) = files
    changed = copy.deepcopy(meta)
    changed["steps"][1][1].update(fields)
    tensor_file.write(tmp_path / "m", tensors, changed)
    with pytest.raises(recombine.UsageError, match=word):
        recombine.load(tmp_path / "m", fresh())


def test_one_flipped_bit_is_refused_anywhere(files, tmp_path):
    folder, _ = files
    whole = (folder / "True").read_bytes()
    draw, header = random.Random(0), int.from_bytes(whole[:8], "little")
    ends = [header] * 40 + [len(whole)] * 20
    for place in [*range(40), *map(draw.randrange, ends)]:
        damaged = bytearray(whole)
        damaged[place] ^= 1 << draw.randrange(8)
        (tmp_path / "m").write_bytes(damaged)
        with pytest.raises(recombine.UsageError) as error:
            recombine.load(tmp_path / "m")
        assert "\n" not in str(error.value)


def test_a_file_without_a_checksum_still_loads(files, tmp_path):
    _, ((meta, tensors), _) = files
    old = {key: value for key, value in meta.items() if key not in ("checksum", "architecture")}
    save_file({n: t.clone() for n, t in tensors.items()}, tmp_path / "m", {"recombine": json.dumps(old)})
    assert recombine.load(tmp_path / "m", fresh()).recombined.steps[0].method == "Svd"
