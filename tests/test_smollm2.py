"""The main job on the real model and the real text, small enough for CI."""

import pytest
import torch
from conftest import rows, summary_of
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from fedtune.config.compose import compose
from fedtune.runtime.local import run_local

SHORT = ("train.batch_size=2", "evaluate.examples=16", "evaluate.batch_size=2", "data.max_length=64")  # little padding


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_run_learns_and_its_adapter_answers_in_plain_peft(tmp_path):
    overrides = [
        "population.cohort=2",
        "rounds=1",
        "train.steps=5",
        "train.lr=4e-3",
        *SHORT,
        "runtime.threads=1",
        f"out={tmp_path / 'run'}",
    ]
    run_local(compose(["experiment=demo", *overrides]))
    summary = summary_of(tmp_path / "run")
    assert summary["last_eval_loss"] < summary["first_eval_loss"] - 0.2
    assert summary["last_eval_accuracy"] > summary["first_eval_accuracy"]

    path = summary["base"]["path"]
    tokenizer = AutoTokenizer.from_pretrained(path)
    base = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    chat = [{"role": "user", "content": "Do you get lonely?"}]
    prompt = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)

    def answer(model):
        tokens = model.generate(**prompt, max_new_tokens=8, do_sample=False, pad_token_id=tokenizer.eos_token_id)
        return tokenizer.decode(tokens[0, prompt["input_ids"].shape[1] :], skip_special_tokens=True).strip()

    before = answer(base)
    after = answer(PeftModel.from_pretrained(base, str(tmp_path / "run" / "adapter")))
    assert after
    assert after != before


@pytest.mark.slow
@pytest.mark.parametrize(("method", "quantization"), [("flora", "nf4"), ("fedex_lora", "int8")])
def test_methods_that_change_the_base_are_exact_on_a_quantized_one(tmp_path, method, quantization, short_smollm2):
    overrides = ["population.cohort=3", "rounds=2", "train.steps=2", "runtime.threads=1", *SHORT]
    run_local(
        compose(
            [
                "experiment=demo",
                f"method={method}",
                f"model.path={short_smollm2}",
                f"model.quantization={quantization}",
                f"out={tmp_path}/run",
                *overrides,
            ]
        )
    )
    before, first, second = rows(tmp_path / "run", "metrics.csv")
    for after in (first, second):
        assert 0 < float(after["aggregation_error"]) < 1e-6
    assert float(second["eval_loss"]) < float(before["eval_loss"])
