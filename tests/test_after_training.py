"""What is done with a run's models: kept round by round, talked to, and pushed."""

import json
import shutil
import sys

import pytest
import torch
from conftest import rows, small, summary_of
from peft import PeftModel
from safetensors.torch import load_file

from fedtune.commands.main import main
from fedtune.core.errors import ConfigError, ExportError
from fedtune.evaluation.conversation import Conversation
from fedtune.export.hub import Push, prepare
from fedtune.export.tuned_model import tuned_model
from fedtune.models.tiny import tiny_model, tiny_tokenizer
from fedtune.runs.run_folder import RunFolder
from fedtune.runtime.local import run_local
from fedtune.workspace.workspace import Workspace

# The loss is lowest after round 2 (asserted below), then it goes up again
KEPT = ("keep.best=true", "keep.every=2", "train.lr=0.5", "train.optimizer=sgd", "train.max_grad_norm=0")


@pytest.fixture(scope="module")
def kept(shared_run):
    return shared_run(*KEPT, rounds=4)


@pytest.fixture(scope="module")
def personal(shared_run):
    return shared_run("method=fedsa_lora", rounds=1)


def losses(folder):
    return [float(row["eval_loss"]) for row in rows(folder, "metrics.csv")]


def content(folder):
    return {file.relative_to(folder): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def test_the_best_round_and_each_nth_are_kept(kept, small_run):
    """The best is the first of the lowest; a kept round is what a run of as many rounds ends with."""
    found = losses(kept)
    best = found.index(min(found))
    assert summary_of(kept)["best"] == {"round": best, "eval_loss": min(found)}
    assert sorted(path.name for path in (kept / "rounds").iterdir()) == ["2", "4"]
    shorter = small_run(*KEPT[2:], rounds=2)
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        assert (kept / "rounds" / "2" / name).read_bytes() == (shorter / "adapter" / name).read_bytes()


def test_a_resumed_run_keeps_the_same(kept, small_run):
    again = small_run(*KEPT, rounds=2)
    run_local(small("rounds=4", *KEPT, out=again), resume=str(again))
    for place in ("best", "rounds"):
        mine, theirs = content(again / place), content(kept / place)
        assert mine.keys() == theirs.keys()
        assert all(mine[name] == theirs[name] for name in mine if name.name != "model.fedtune")


def test_the_best_changes_with_the_checkpoint(tmp_path):
    """Killed before the checkpoint, the best before stays; killed after it, the new one takes its place."""
    folder = RunFolder(tmp_path)
    folder.write_kept("best", {"kept.json": b'{"round": 1, "eval_loss": 2.0}'})
    for round in (2, 3):
        folder.write_kept(f".best-{round}", {"kept.json": b'{"round": %d, "eval_loss": 1.0}' % round})
    folder.write_kept("rounds/3", {"kept.json": b"{}"})
    shutil.copytree(tmp_path, tmp_path / "copy")
    folder.settle_kept(1)
    assert folder.best()["round"] == 1
    assert not list((tmp_path / "rounds").iterdir())
    folder.close()
    copy = RunFolder(tmp_path / "copy")
    copy.settle_kept(2)
    assert copy.best()["round"] == 2
    assert not list(copy.path.glob(".best*"))
    copy.close()


@pytest.mark.slow
def test_what_cant_be_kept_is_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"keep.best=true goes by the held-out loss"):
        small("keep.best=true", "evaluate.every=0", out=tmp_path)
    with pytest.raises(ConfigError, match=r"leave out keep.best and keep.every"):
        Workspace(small("keep.every=2", "method=fedsa_lora", out=tmp_path))


def test_evaluate_takes_a_kept_round(kept, capsys, tmp_path):
    assert main(["evaluate", str(kept), "--round", "2", "--out", str(tmp_path / "scores.json")]) == 0
    scores = json.loads((tmp_path / "scores.json").read_text())
    assert (scores["round"], scores["heldout"]["loss"]) == (2, losses(kept)[2])
    assert main(["evaluate", str(kept), "--round", "3"]) == 1
    assert "kept 2, 4, best beside the last" in capsys.readouterr().err


def test_a_conversation_is_the_tokens_of_training_and_the_answers_of_plain_peft(kept):
    """Greedy, by hand: the likeliest token again and again, the adapter switched off for the base."""
    tuned = tuned_model(kept, both=True)
    talk, told = Conversation(tuned.tokenizer, tuned.data), []
    tokens = talk.prompt("Hello")
    asked = [{"role": "user", "content": "Hello"}]
    shown = tiny_tokenizer().apply_chat_template(asked, add_generation_prompt=True, return_dict=True)["input_ids"]
    assert tokens == shown
    by_hand = {}
    for name, model in {
        "tuned": PeftModel.from_pretrained(tiny_model(), kept / "adapter").eval(),
        "base": tiny_model().eval(),
    }.items():
        said = list(tokens)
        for _ in range(6):
            with torch.no_grad():
                said.append(int(model(torch.tensor([said])).logits[0, -1].argmax()))
            if said[-1] == tiny_tokenizer().eos_token_id:
                break
        by_hand[name] = tiny_tokenizer().decode(said[len(tokens) :], skip_special_tokens=True)
    assert talk.ask(tuned.module, "Hello", told.append, 6) == by_hand["tuned"] == "".join(told)
    with tuned.untuned() as base:
        assert Conversation(tuned.tokenizer, tuned.data).ask(base, "Hello", told.append, 6) == by_hand["base"]
    assert by_hand["tuned"] != by_hand["base"]
    more = talk.prompt("and then?")
    assert more[: len(tokens)] == tokens
    assert isinstance(talk.turns[1]["content"], str)


def test_chat_reads_lines_where_there_is_no_terminal(kept, capsys, monkeypatch, tmp_path):
    lines = tmp_path / "lines"
    lines.write_text("Hello\n/reset\nHello\n/quit\nnever asked\n")
    with lines.open() as stream:
        monkeypatch.setattr(sys, "stdin", stream)
        assert main(["chat", str(kept), "--max-new-tokens", "3"]) == 0
    said = capsys.readouterr().out
    first, again = said.replace("> /quit\n", "").split("> /reset\nbegun anew\n")
    assert first == again
    assert "never asked" not in said


def test_chat_takes_a_clients_own_model(personal, kept, capsys):
    """It is the client's B, from its file, on everybody's A."""
    mine = [tuned_model(personal, client=index).module.state_dict() for index in (0, 1, 2, 3)]
    held = load_file(personal / "adapter" / "adapter_model.safetensors")
    names = [name for name in mine[0] if "lora_A" in name]
    assert all(torch.equal(mine[0][name], held[name.replace(".default", "")]) for name in names)
    assert any(state["base_model.model.model.layers.0.self_attn.q_proj.lora_B.default.weight"].any() for state in mine)
    assert main(["chat", str(personal), "--prompt", "hey", "--client", "0", "--max-new-tokens", "2"]) == 0
    for folder, client, why in ((kept, "0", "all clients have one model"), (personal, "9", "clients 0 to 3")):
        assert main(["chat", str(folder), "--prompt", "hey", "--client", client]) == 1
        assert why in capsys.readouterr().err
    assert main(["chat", str(personal), "--prompt", "hey"]) == 1
    assert "as many models as clients" in capsys.readouterr().err


def test_what_a_dry_run_writes_is_the_adapter_and_a_card_without_paths(kept, tmp_path):
    done = prepare(Push(kept, "me/toy", round="2"), str(tmp_path / "out"))
    assert set(done.files) == {"README.md", "adapter_config.json", "adapter_model.safetensors"}
    card = (tmp_path / "out" / "README.md").read_text()
    _, front, text = card.split("---\n", 2)
    assert "library_name: peft" in front
    assert "- federated-learning" in front
    for said in (
        "[arXiv:2305.05644]",
        "| Rounds | 2 |",
        f"{losses(kept)[2]:.4f} after",
        "updates were sent as they are",
    ):
        assert said in text
    assert "data.path=pairs.jsonl" in text
    assert str(kept.parent) not in card
    assert "/tests/" not in card
    PeftModel.from_pretrained(tiny_model(), tmp_path / "out")


def test_pushing_is_refused_in_a_line(kept, capsys, monkeypatch, tmp_path):
    def refusal(*words):
        assert main(["push", str(kept), "me/toy", *words]) == 1
        return capsys.readouterr().err

    monkeypatch.setenv("HF_TOKEN_PATH", str(tmp_path / "none"))
    monkeypatch.setattr("huggingface_hub.get_token", lambda: None)
    assert "no token for" in refusal()
    monkeypatch.setattr("huggingface_hub.get_token", lambda: "a-token")
    monkeypatch.setenv("HF_TOKEN", "a-token")
    assert "HF_HUB_OFFLINE is set" in refusal("--create")
    assert "add --create" in refusal("--private")
    assert "kept 2, 4, best" in refusal("--round", "3", "--dry-run")
    with pytest.raises(ConfigError, match="as user/name"):
        Push(kept, "toy")
    with pytest.raises(ExportError, match="holds no run"):
        prepare(Push(tmp_path, "me/toy"), None)
