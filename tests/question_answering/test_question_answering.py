"""Question answering: causality, batches, generation, training, and the accuracy of the embedded target."""

import json
import math
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from lightning import LightningDataModule, Trainer, seed_everything

from datamodules import WordProblems
from datamodules.batch import IGNORE
from datamodules.errors import UserError
from datamodules.problems import generate, generate_passkey
from lightning_modules.pretrained.loading import Pretrained
from lightning_modules.pretrained.prompts import Prompt, encode, pad
from lightning_modules.question_answering import QuestionAnswering
from lightning_modules.question_answering.tokenizer import ByteLevelBPE

PAIR = Path(__file__).parents[2] / "assets" / "pair"
TINY = {
    "model_type": "llama",
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 256,
}


def of_pair(which: str, **options) -> QuestionAnswering:
    return QuestionAnswering(Pretrained(str(PAIR / which)), **options).eval()


def trainer(path: Path, **options) -> Trainer:
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    return Trainer(accelerator="cpu", default_root_dir=path, enable_checkpointing=False, **quiet, **options)


@pytest.fixture(scope="module")
def problems() -> list:
    return [generate(5, "train", i) for i in range(12)] + [generate_passkey(5, "train", i) for i in range(2)]


@pytest.mark.parametrize("which", ["source", "target"])
def test_no_logit_depends_on_what_comes_after(which):
    model = of_pair(which).model
    torch.manual_seed(0)
    embeds_BTD = model.get_input_embeddings()(torch.randint(3, 500, (2, 16))).detach().requires_grad_()
    logits_BTV = model(inputs_embeds=embeds_BTD).logits
    for t in (0, 7, 14):
        (grad_BTD,) = torch.autograd.grad(logits_BTV[:, t].square().sum(), embeds_BTD, retain_graph=True)
        assert (grad_BTD[:, t + 1 :] == 0).all()
        assert (grad_BTD[:, : t + 1].abs().amax(dim=(0, 2)) > 0).all()


def test_the_target_answers_what_it_reads_and_nothing_blindly(tmp_path):
    module = of_pair("target")
    data = WordProblems(test_sets={"test": 200, "passkey": 20}, validation_size=1, eval_batch_size=100)
    (metrics, *_) = trainer(tmp_path).test(module, data, verbose=False)
    assert metrics["test/accuracy"] >= 0.9
    assert metrics["test/blind_accuracy"] <= 0.05
    assert metrics["passkey/accuracy"] >= 0.9
    low, high = module.intervals["test/accuracy"]
    assert low < metrics["test/accuracy"] <= high
    assert module.counts == {name: 200 if name.startswith("test") else 20 for name in metrics}
    assert module.hits.keys() == module.counts.keys()
    for name, (hits,) in module.hits.items():
        assert hits / module.counts[name] == pytest.approx(metrics[name])


def test_predict_writes_the_answers(tmp_path):
    data = WordProblems(test_sets={"test": 5}, validation_size=1, eval_batch_size=2)
    predictor = trainer(tmp_path)
    predictor.predict(of_pair("target"), data)
    rows = [json.loads(line) for line in Path(tmp_path, "samples", "predictions.jsonl").read_text().splitlines()]
    assert {row["prompt"]: row["reference"] for row in rows} == {
        problem.question: problem.answer for problem in data.eval_problems["test"]
    }
    assert all(row["output"] and set(row["scores"]) == {"accuracy"} for row in rows)


def test_a_model_that_diverged_has_no_accuracy(tmp_path):
    module = of_pair("target", max_new_tokens=2)
    torch.nn.init.constant_(module.model.base_model.norm.weight, torch.nan)
    data = WordProblems(test_sets={"test": 2}, validation_size=1)
    (metrics,) = trainer(tmp_path).test(module, data, verbose=False)
    assert all(math.isnan(value) for value in metrics.values())
    assert (module.counts, module.hits, module.intervals) == (dict.fromkeys(metrics, 2), {}, {})


def test_a_test_begins_without_the_counts_of_one_that_failed(tmp_path):
    module = of_pair("target", max_new_tokens=2)
    data = WordProblems(test_sets={"test": 4, "passkey": 2}, validation_size=1, eval_batch_size=2)
    step = module.test_step

    def failing(batch, batch_idx, dataloader_idx=0):
        step(batch, batch_idx, dataloader_idx)
        raise RuntimeError("lost")

    module.test_step = failing
    with pytest.raises(RuntimeError, match="lost"):
        trainer(tmp_path).test(module, data, verbose=False)
    # Every rank sums over ranks for every set, also for one of which it has no batch
    measures = ("accuracy", "blind_accuracy")
    assert set(module.proportions) == {f"{name}/{measure}" for name in ("test", "passkey") for measure in measures}
    module.test_step = step
    trainer(tmp_path).test(module, data, verbose=False)
    assert module.counts == {f"{name}/{m}": n for name, n in (("test", 4), ("passkey", 2)) for m in measures}


def test_a_set_without_a_batch_has_no_accuracy(tmp_path):
    module = of_pair("target", max_new_tokens=2)
    data = WordProblems(test_sets={"test": 2}, validation_size=1)
    trainer(tmp_path, limit_test_batches=0).test(module, data, verbose=False)
    assert module.counts == {}


def test_the_held_out_loss_does_not_depend_on_the_batch_size(tmp_path):
    losses = []
    for size in (2, 7):
        data = WordProblems(test_sets={"test": 1}, validation_size=7, eval_batch_size=size)
        (metrics,) = trainer(tmp_path).validate(of_pair("target"), data, verbose=False)
        losses.append(metrics["validation/loss"])
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_left_padding_changes_no_answer(problems):
    module = of_pair("target")
    prompts = module.collate(problems, training=False)["prompts"]
    assert len(set(map(len, prompts))) > 3
    assert module._answers(prompts) == [module._answers([prompt])[0] for prompt in prompts]


@pytest.mark.parametrize("answer_only", [False, True])
def test_labels(problems, answer_only):
    module = of_pair("target", answer_only=answer_only)
    batch = module.collate(problems, training=True)
    assert set(batch) == {"tokens", "labels"}
    for tokens_T, labels_T, problem in zip(batch["tokens"], batch["labels"], problems, strict=True):
        labelled = labels_T != IGNORE
        assert not labelled[-1]
        assert torch.equal(labels_T[labelled], tokens_T.roll(-1)[labelled])  # the label of a position is the next token
        text = module.tokenizer.decode(labels_T[labelled])
        whole = f" {problem.answer}</s>"
        assert text == (whole if answer_only else f"Question: {problem.question}\nAnswer:{whole}")


@pytest.mark.parametrize("answer_only", [False, True])
@torch.no_grad()
def test_the_loss_is_the_cross_entropy_of_each_next_token(problems, answer_only):
    module = of_pair("target", answer_only=answer_only)
    losses = []
    for problem in problems:
        prompt, answer = encode(module.tokenizer, [module.prompt.fill(problem.question), f" {problem.answer}"])
        tokens_T = torch.tensor([module.tokenizer.bos_token_id, *prompt, *answer, module.tokenizer.eos_token_id])
        losses_T = torch.nn.functional.cross_entropy(module(tokens_T[None])[0, :-1], tokens_T[1:], reduction="none")
        losses.append(losses_T[len(prompt) :] if answer_only else losses_T)
    batch = module.collate(problems, training=True)
    torch.testing.assert_close(module.loss(batch), torch.cat(losses).mean(), atol=1e-6, rtol=1e-5)


def test_a_share_of_the_training_problems_repeats_the_question():
    module = of_pair("target", repeat_fraction=0.2)
    problems = [generate(6, "train", i) for i in range(2000)]
    texts = module.tokenizer.batch_decode(module.collate(problems, training=True)["tokens"], skip_special_tokens=True)
    repeats = [i for i, text in enumerate(texts) if "\nRepeat:" in text]
    assert len(repeats) / 2000 == pytest.approx(0.2, abs=0.03)
    question = problems[repeats[0]].question
    assert texts[repeats[0]] == f"Question: {question}\nRepeat: {question}"
    shown = module.collate(problems[:200], training=False)["tokens"]
    assert not any("\nRepeat:" in text for text in module.tokenizer.batch_decode(shown))


def test_samples_for_evaluation_in_passing(problems):
    module = of_pair("target")
    samples = module.sample_eval(module.collate(problems, training=False))
    for sample, problem in zip(samples, problems, strict=True):
        assert (sample.prompt, sample.reference) == (problem.question, problem.answer)
        assert sample.scores == {"accuracy": float(problem.is_correct(sample.output))}


def test_training_lowers_the_loss_and_saves_what_loads_again(tmp_path, capfd):
    seed_everything(0, verbose=False)
    optimizer = partial(torch.optim.AdamW, lr=1e-2)
    made = tmp_path / "made" / "model"
    module = QuestionAnswering(
        config=TINY, tokenizer=ByteLevelBPE(300, True, 300), optimizer=optimizer, save_to=str(made)
    )
    losses = []
    module.on_train_batch_end = lambda outputs, *_: losses.append(outputs["loss"].item())
    data = WordProblems(batch_size=32, epoch_size=32 * 100, validation_size=10, test_sets={"test": 1})
    trainer(tmp_path, max_steps=40, limit_val_batches=0).fit(module, data)
    assert losses[0] > 5
    assert sum(losses[-5:]) / 5 < losses[0] - 2
    assert "shards" not in capfd.readouterr().err

    again, whole = QuestionAnswering(Pretrained(str(made))).eval(), module.eval()
    batch = again.collate(data.eval_problems["validation"], training=False)
    assert torch.equal(batch["tokens"], whole.collate(data.eval_problems["validation"], training=False)["tokens"])
    assert torch.equal(again(batch["tokens"]), whole(batch["tokens"]))
    assert again.model.config.bos_token_id == again.tokenizer.bos_token_id == 1


def test_a_new_model_takes_its_special_tokens_from_the_tokenizers_folder():
    torch.backends.cuda.enable_cudnn_sdp(True)
    module = QuestionAnswering(config=TINY, tokenizer=str(PAIR / "target"))
    config, tokenizer = module.model.config, module.tokenizer
    assert (config.pad_token_id, config.bos_token_id, config.eos_token_id) == (0, 1, 2)
    assert config.vocab_size == len(tokenizer) == 512
    assert not torch.backends.cuda.cudnn_sdp_enabled()


def test_tokenizers_cut_numbers_as_asked():
    texts = [f"{p.question} {p.answer}" for p in (generate(0, "train", i) for i in range(200))]
    text = "Zoë has 123 cups: #### 123\n"
    for single_digits in (True, False):
        tokenizer = ByteLevelBPE(400, single_digits).train(texts)
        assert len(tokenizer) <= 400
        tokens = tokenizer.encode(text, add_special_tokens=False)
        assert tokenizer.decode(tokens) == text
        assert single_digits == all(not (t.isdigit() and len(t) > 1) for t in tokenizer.get_vocab())
    assert tokenizer.convert_tokens_to_ids(["<pad>", "<s>", "</s>"]) == [0, 1, 2]


def test_mistakes_are_told():
    with pytest.raises(ValueError, match="either 'pretrained' or 'config'"):
        QuestionAnswering()
    with pytest.raises(ValueError, match=r"model.config needs model.tokenizer"):
        QuestionAnswering(config=TINY)
    with pytest.raises(UserError, match=r"^model\.tokenizer is for model\.config: use model\.pretrained\.tokenizer"):
        of_pair("target", tokenizer=str(PAIR / "source"))
    with pytest.raises(ValueError, match=r"model_type must be .* not 'lama'"):
        QuestionAnswering(config=TINY | {"model_type": "lama"}, tokenizer=ByteLevelBPE(300, True))
    with pytest.raises(ValueError, match="repeat_fraction must be at most 1, not 20"):
        of_pair("target", repeat_fraction=20)
    untrained = QuestionAnswering(config=TINY, tokenizer=ByteLevelBPE(300, True))
    untrained.trainer = SimpleNamespace(datamodule=LightningDataModule(), precision="32-true")
    with pytest.raises(ValueError, match=r"model.tokenizer: LightningDataModule has no texts to train on"):
        untrained.setup("fit")
    untrained.trainer.precision = "bf16-true"
    with pytest.raises(ValueError, match="bf16-true rounds small updates away"):
        untrained.setup("fit")
    with pytest.raises(ValueError, match="vocab_size must be at least 259"):
        ByteLevelBPE(100, True)
    with pytest.raises(ValueError, match=r"^model\.prompt needs one '{question}'"):
        Prompt("Question:")
    with pytest.raises(ValueError, match=r"^model\.repeat_prompt needs one '{question}'"):
        of_pair("target", repeat_prompt="Repeat:")


@pytest.mark.parametrize("owner", ["pretrained", "config"])
def test_weights_of_a_low_precision_answer_and_do_not_train(owner):
    rounded = Pretrained(str(PAIR / "target"), dtype="bfloat16")
    made = {"config": TINY | {"dtype": "bfloat16"}, "tokenizer": str(PAIR / "target")}
    module = QuestionAnswering(rounded) if owner == "pretrained" else QuestionAnswering(**made)
    module.trainer = SimpleNamespace(datamodule=LightningDataModule(), precision="32-true")
    module.setup("test")
    with pytest.raises(UserError, match=rf"^model\.{owner}\.dtype: bfloat16 rounds small updates away, use float32"):
        module.setup("fit")


def test_a_static_cache_is_used_where_it_is_asked_for(monkeypatch, problems):
    asked = []
    generation = "lightning_modules.question_answering.module.generate"
    monkeypatch.setattr(generation, lambda *_, static_cache, **__: asked.append(static_cache) or [])
    for static in (False, True):
        module = QuestionAnswering(Pretrained(str(PAIR / "target"), static_cache=static)).eval()
        module._answers([[1, 5]])
    assert asked == [False, True]


def test_prompts_and_padding():
    prompt = Prompt("Q: {question}\nA:")
    assert prompt.fill("How {many}?") == "Q: How {many}?\nA:"
    tokens_BT, mask_BT = pad([[1, 2, 3], [4]], 9)
    assert tokens_BT.tolist() == [[1, 2, 3], [4, 9, 9]]
    assert mask_BT.tolist() == [[True] * 3, [True, False, False]]
