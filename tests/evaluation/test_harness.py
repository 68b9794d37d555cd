"""Perplexity and lm-eval's scores of language models."""

import recombine  # isort: skip  (its guard comes before transformers)

import copy

import lightning as L
import numpy as np
import pytest
import torch
import torch.nn.functional as F

from helpers.llamas import line, loaded, rows, write
from recombine import Budget, Svd
from recombine.data.language import choices, prompts
from recombine.evaluation import harness
from recombine.training import objectives
from recombine.training.lit import LitRecombine


def test_perplexity(tiny_llama, toy_packages, byte_tokenizer):
    samples = loaded("choices", byte_tokenizer, task="wiki_description").test
    total = count = 0
    for i in range(len(samples)):  # one by one, so that nothing is padding
        one = samples.__getitems__([i])
        log = tiny_llama(input_ids=one["input_ids"]).logits.double().log_softmax(-1)[0]
        for t in range(1, one["labels"].shape[1]):
            if (label := one["labels"][0, t]) != -100:
                total, count = total - log[t - 1, label].item(), count + 1
    assert harness.perplexity(tiny_llama, samples, batch_size=3) == pytest.approx(np.exp(total / count), rel=1e-5)
    assert (
        harness.perplexity(tiny_llama.train(), samples, limit=1) > 1
        and tiny_llama.training
        and not tiny_llama.eval().training
    )


def test_the_task_of_the_stages_has_the_same_loss(tiny_llama, toy_packages, byte_tokenizer):
    module = loaded("text", byte_tokenizer, task="wiki", max_length=16, limit=3)
    loss, _ = objectives.build(module).loss(
        tiny_llama, objectives.fetch(module, module.test, [0, 1, 2], torch.device("cpu"))
    )
    assert harness.perplexity(tiny_llama, module.test) == pytest.approx(loss.exp().item(), rel=1e-5)


def test_a_splits_loss_is_the_mean_over_its_tokens(tiny_llama, toy_packages, byte_tokenizer):
    """Through the trainer, in batches of other numbers of tokens, the last of them of fewer rows."""
    module = loaded("choices", byte_tokenizer, task="wiki_description", batch_size=3)
    module.test.rows = [
        (prompt, response * (1 + 5 * (i % 4 == 0))) for i, (prompt, response) in enumerate(module.test.rows)
    ]
    sums, counts = [], []
    for i in range(len(module.test)):  # one by one, so that nothing is padding
        one = module.test.__getitems__([i])
        log, labels = (
            tiny_llama(input_ids=one["input_ids"]).logits.double().log_softmax(-1)[0, :-1],
            one["labels"][0, 1:],
        )
        sums.append(F.nll_loss(log, labels, ignore_index=-100, reduction="sum").item())
        counts.append((labels != -100).sum().item())
    by_batch = [sum(counts[i : i + 3]) for i in range(0, len(counts), 3)]
    exact, by_rows = (
        sum(sums) / sum(counts),
        np.average(
            [sum(sums[i : i + 3]) / n for i, n in zip(range(0, len(sums), 3), by_batch, strict=True)],
            weights=[min(3, len(sums) - i) for i in range(0, len(sums), 3)],
        ),
    )
    assert len(set(by_batch)) > 1 and len(counts) % 3 and abs(exact - by_rows) > 1e-3 * exact
    lit = LitRecombine(copy.deepcopy(tiny_llama), Svd(), objectives.build(module))
    quiet = {
        "logger": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "enable_checkpointing": False,
    }
    trainer = L.Trainer(accelerator="cpu", devices=1, **quiet)
    (found,) = trainer.test(lit, module.test_dataloader(), verbose=False)
    assert found["test/loss"] == pytest.approx(exact, rel=1e-6)
    (found,) = trainer.validate(lit, module.test_dataloader(), verbose=False)
    assert found["val/loss"] == pytest.approx(exact, rel=1e-6)
    assert lit.objective.report({"loss": exact})["ppl"] == pytest.approx(
        harness.perplexity(tiny_llama, module.test), rel=1e-5
    )
    nothing = {k: v[:, :2] for k, v in module.test.__getitems__([0]).items()}  # a batch without a token that counts
    loss, _ = lit.objective.loss(tiny_llama, nothing)
    assert loss == 0 and lit.objective.weight(nothing) == 0


def test_likelihoods_are_the_models(tiny_llama, toy_packages, byte_tokenizer, offline):
    """Against log-likelihoods summed here; nothing connects."""
    found = harness.evaluate(tiny_llama, byte_tokenizer, choices.TASKS, batch_size=3)
    for task in choices.TASKS:
        right = {"acc": 0, "acc_norm": 0}
        questions = choices.items(task, "test")
        for item in questions:
            prompt = prompts.CHOICES[task].format(item["question"])
            sums = []
            for option in item["options"]:
                ids = torch.tensor(byte_tokenizer(f"{prompt} {option}")["input_ids"])
                log = tiny_llama(input_ids=ids[None]).logits[0].log_softmax(-1)
                begin = len(byte_tokenizer(prompt)["input_ids"])
                sums.append(log[begin - 1 : -1].gather(1, ids[begin:, None]).sum().item())
            lengths = [len(option) for option in item["options"]]
            right["acc"] += int(np.argmax(sums) == item["answer"])
            right["acc_norm"] += int(np.argmax(np.array(sums) / lengths) == item["answer"])
        for metric, count in right.items():
            assert found[f"{task}/{metric}"] == pytest.approx(count / len(questions)), (task, metric)
            assert f"{task}/{metric}_stderr" in found
    assert harness.evaluate(tiny_llama, byte_tokenizer, ["capital_of"], limit=2).keys() < found.keys()


def test_a_recombined_model_is_scored_in_memory(tiny_llama, toy_packages, byte_tokenizer):
    exact = copy.deepcopy(tiny_llama)
    recombine.apply(exact, Svd(energy=1.0))
    before, after = (harness.evaluate(m, byte_tokenizer, ["wordnet_definition"]) for m in (tiny_llama, exact.train()))
    assert before == after and exact.training
    recombine.apply(small := copy.deepcopy(tiny_llama), Svd(), Budget.parse("retained_40"))
    samples = loaded("text", byte_tokenizer, task="wiki", max_length=16).test
    assert harness.perplexity(small, samples) != pytest.approx(harness.perplexity(tiny_llama, samples), rel=1e-4)


def test_answers_are_generated_and_read(tiny_llama, toy_packages, byte_tokenizer, tmp_path, offline):
    for name in harness.FILES.values():
        write(tmp_path / name / "test.json", rows(3))
    tried = ["gsm8k_metamath", "commonsense_boolq"]
    recombine.apply(small := copy.deepcopy(tiny_llama), Svd(), Budget.parse("retained_40"))
    scores = harness.evaluate(small, byte_tokenizer, tried, limit=1, root=tmp_path)
    assert scores["gsm8k_metamath/exact_match"] == 0.0 == scores["commonsense_boolq/exact_match"]
    said = {
        "gsm8k_metamath": ["So 2. The answer is: $1,002.", "The answer is: 3. The answer is: 1002", "1002"],
        "commonsense_boolq": [" the correct answer is true", "false", "it is false, not true"],
    }
    right = {"gsm8k_metamath": [1, 1, 0], "commonsense_boolq": [1, 1, 0]}
    for name, task in harness.load(tried, tmp_path)["tasks"].items():
        task.build_all_requests(limit=None, rank=0, world_size=1)
        for instance, answer in zip(task.instances, said[name], strict=True):
            instance.resps = [answer]
        task.apply_filters()
        marks = [task.process_results(i.doc, [i.filtered_resps["none"]])["exact_match"] for i in task.instances]
        assert marks == right[name], name
    assert "test.json" in line(harness.load, ["commonsense_piqa"], tmp_path / "none")


def test_tasks_that_cannot_be_had(tiny_llama, byte_tokenizer, offline, monkeypatch, tmp_path):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path))
    for place in ("huggingface_hub.constants", "datasets.config"):
        monkeypatch.setattr(f"{place}.HF_HUB_OFFLINE", True)  # else the client tries again for half a minute
    said = line(harness.evaluate, tiny_llama, byte_tokenizer, ["piqa"])
    assert all(way in said for way in ("connect once", "HF_HOME", "wiki_description"))
    assert "did you mean capital_of" in line(harness.evaluate, tiny_llama, byte_tokenizer, ["capital"])


def test_lm_eval_knows_the_papers_sets():
    assert set(harness.COMMONSENSE) <= set(harness.index(True).all_tasks) <= harness.spelled()
