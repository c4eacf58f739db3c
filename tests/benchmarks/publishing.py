"""Published and read back: finished folders go to the test Hub with every fault on the way, come down into clean
processes without hf_compress, and answer as they did. Their cards are what model_cards/ holds.

python tests/benchmarks/publishing.py outputs/deepseek-v3-w4 outputs/quickstart outputs/smollm2-sparse
"""

from __future__ import annotations

import argparse
import io
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any
from unittest import mock

sys.path.insert(0, str(Path(__file__).parents[2]))
ALICE, BOB = "hf_" + "a" * 34, "hf_" + "b" * 34
CARDS = Path(__file__).parents[2] / "model_cards"
CLEAN = """
import json, sys, torch, transformers
sys.modules["hf_compress"] = None
folder, repo, auto, task, bob = sys.argv[1:]
kind = getattr(transformers, auto)
options = {"max_new_tokens": 8, "do_sample": False} if task == "text-generation" else {}
seen = []
for place in (folder, repo):  # as it lies here, then from the Hub through an empty cache
    torch.manual_seed(0)
    model, info = kind.from_pretrained(place, output_loading_info=True)
    assert not any(info.values()), info
    with torch.no_grad(): logits = model(torch.randint(5, model.config.vocab_size, (2, 12))).logits.float()
    seen.append((logits, transformers.pipeline(task, place)("The film was", **options)))
    del model
def readable(token, cache):
    try: return transformers.AutoConfig.from_pretrained(repo, token=token, cache_dir=cache).model_type
    except OSError as error: return "refused: " + str(error).splitlines()[0]
(here, said), (there, also) = seen
print("SEEN" + json.dumps({
    "hf_compress importable": sys.modules["hf_compress"] is not None,
    "largest logit difference": float((here - there).abs().max() / here.abs().max()),
    "pipeline, folder": said, "pipeline, Hub": also,
    "private, nobody": readable(False, "nobody"), "private, another user": readable(bob, "bob"),
}))
"""


def command(*words: str) -> str:
    """The last line that `hf-compress WORDS` prints, with its exit code."""
    from hf_compress import cli

    shown, code = io.StringIO(), 0
    cli.console.file = cli.errors.file = shown
    cli.console.width = cli.errors.width = 300  # a sentence a line
    with mock.patch.object(sys, "argv", ["hf-compress", *words]):
        try:
            cli.main()
        except SystemExit as stop:
            code = int(stop.code or 0)
    plain = [line.strip(" │") for line in shown.getvalue().splitlines() if line.strip(" │╭╮╰╯─")]
    return f"exit {code}: {' / '.join(plain[-3:] if code else plain[-1:])}"


def round_trip(hub: Any, folder: Path, scratch: Path) -> dict[str, Any]:
    """Everything that must hold of one finished folder; each entry is what was seen."""
    from huggingface_hub import ModelCard

    from tests.hub.server import Fault

    scratch.mkdir()
    repo, facts = f"alice/{folder.name}", json.loads((folder / "hf_compress.json").read_text())
    task = {"causal-lm": "text-generation"}.get(facts["task"], facts["task"])
    auto = {"text-generation": "AutoModelForCausalLM"}.get(task, "AutoModelForSequenceClassification")
    weights = (folder / "model.safetensors").stat().st_size
    seen: dict[str, Any] = {"folder": folder.name, "weights, bytes": weights}

    hub.faults.append(Fault("PUT", "/_blobs/", drop=weights // 2, times=10_000))  # every upload, until it gives up
    with mock.patch("hf_compress.hub.ATTEMPTS", 1):  # the client's own six tries are patience enough here
        seen["upload interrupted"] = command("publish", str(folder), repo, "--private")
    seen["commits then"] = len(hub.repos[repo].commits)
    hub.faults.clear()
    hub.faults += [Fault("POST", "/commit/", status=500), Fault("POST", "/commit/", drop="after")]
    started = time.time()
    trust = mock.patch("hf_compress.hub.verify", lambda f: {str(f): {}})  # it was verified a moment ago
    with trust:
        seen["resumed, through a 500 and a lost answer"] = command("publish", str(folder), repo, "--private")
        seen["seconds"] = round(time.time() - started, 1)
        seen["commits on main"] = len(hub.repos[repo].history("main"))
        hub.log.clear()
        seen["again"] = command("publish", str(folder), repo, "--private")
        seen["uploads and commits then"] = len(hub.sent("PUT", "/_blobs/")) + len(hub.sent("POST", "/commit/"))
        seen["revision"] = command("publish", str(folder), repo, "--revision", "v1")
        seen |= pull_request(hub, folder, repo)
    seen["refs"] = sorted(hub.repos[repo].refs)

    card = hub.repos[repo].at("main").files["README.md"].data.decode()
    ModelCard(card).validate()
    snippets = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
    env = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "HF_HOME")} | {
        "HF_HOME": str(scratch / "new")
    }
    code = "\n".join([CLEAN, *snippets, f"print('SNIPPETS {len(snippets)} ran, logits', tuple(logits.shape))"])
    words = [sys.executable, "-P", "-c", code, str(folder.absolute()), repo, auto, task, BOB]
    ran = subprocess.run(words, env=env, capture_output=True, text=True, cwd=scratch)
    if ran.returncode:
        raise SystemExit(f"the clean process died:\n{ran.stderr[-3000:]}")
    lines = ran.stdout.splitlines()
    seen |= json.loads(next(x for x in lines if x.startswith("SEEN")).removeprefix("SEEN"))
    seen["snippets as they stand"] = next(x for x in lines if x.startswith("SNIPPETS"))
    seen["verify"] = command("verify", repo)
    return seen


def pull_request(hub: Any, folder: Path, repo: str) -> dict[str, Any]:
    """A person writes into the card here and asks the owner to take it: main stays, the request's ref holds it."""
    held, card = hub.repos[repo], folder / "README.md"
    before, plain = held.at("main"), card.read_text()
    card.write_text(plain + "\n## Where it is used\n\nIn a shop for films.\n")
    seen = {"pull request with a changed card": command("publish", str(folder), repo, "--create-pr")}
    card.write_text(plain)
    main, asked = held.at("main"), held.at("refs/pr/1")
    changed = {n for n in main.files.keys() | asked.files.keys() if main.files.get(n) != asked.files.get(n)}
    seen["main then"] = "untouched" if main == before else "changed"
    seen["the request changes"] = sorted(changed)
    seen["the request's card, the last line"] = asked.files["README.md"].data.decode().splitlines()[-1]
    return seen


def keep_card(folder: Path) -> None:
    """model_cards/NAME/: the card as written into the folder, its facts and plots; nothing of this machine."""
    from hf_compress.card import FACTS, read_facts, save_facts, without_folders, write_card

    target = CARDS / folder.name
    shutil.rmtree(target, ignore_errors=True)
    target.mkdir()
    facts = {key: value for key, value in read_facts(folder).items() if key != "published"}
    save_facts(without_folders(facts), target / FACTS)
    write_card(target)


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("folders", nargs="+", type=Path)
    parser.add_argument("--cards-only", action="store_true")
    asked = parser.parse_args()
    if asked.cards_only:
        for made in asked.folders:
            keep_card(made)
    else:
        from tests.hub.server import Hub

        with tempfile.TemporaryDirectory() as room:
            hub = Hub({ALICE: "alice", BOB: "bob"}).start()
            os.environ |= {"HF_ENDPOINT": hub.url, "HF_HOME": f"{room}/home", "HF_TOKEN": ALICE}
            os.environ |= {"HF_HUB_DISABLE_XET": "1", "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_TELEMETRY": "1"}
            for made in asked.folders:  # the client reads the address when it is first imported: one Hub for all
                copy = Path(shutil.copytree(made, Path(room) / made.name))
                print(json.dumps(round_trip(hub, copy, Path(room) / f"clean-{made.name}"), indent=2), flush=True)
