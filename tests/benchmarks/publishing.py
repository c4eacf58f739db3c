"""Published and read back: finished folders go to the test Hub with every fault on the way, come down into clean
processes without hf_compress, and answer as they did. Their cards are what model_cards/ holds.

python tests/benchmarks/publishing.py outputs/deepseek-v3-w4 outputs/quickstart outputs/smollm2-sparse
"""

from __future__ import annotations

import argparse
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

sys.path.insert(0, str(Path(__file__).parents[2]))
ALICE, BOB = "hf_" + "a" * 34, "hf_" + "b" * 34
CARDS = Path(__file__).parents[2] / "model_cards"
ANSWERS = """
import json, sys, torch, transformers
sys.modules["hf_compress"] = None
torch.manual_seed(0)
place, auto, task = sys.argv[1:]
kind = getattr(transformers, auto)
model, info = kind.from_pretrained(place, output_loading_info=True)
assert not any(info.values()), info
ids = torch.randint(5, model.config.vocab_size, (2, 12))
with torch.no_grad(): logits = model(ids).logits.float()
options = {"max_new_tokens": 8, "do_sample": False} if "generation" in task else {}
said = transformers.pipeline(task, place)("The film was", **options)
print("ANSWER" + json.dumps([logits.flatten()[:5000].tolist(), said]))
"""


def environment(hub: Any, token: str, home: Path) -> dict[str, str]:
    env = {k: v for k, v in os.environ.items() if not k.startswith("HF_")}
    env |= {"HF_ENDPOINT": hub.url, "HF_HOME": str(home), "HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}
    return env | ({"HF_TOKEN": token} if token else {})


def clean(hub: Any, code: str, *words: str, token: str = ALICE) -> subprocess.CompletedProcess[str]:
    """Code in a process with an empty cache where hf_compress cannot be imported (-P, and no PYTHONPATH)."""
    with tempfile.TemporaryDirectory() as home:
        env = environment(hub, token, Path(home))
        env.pop("PYTHONPATH", None)
        return subprocess.run(
            [sys.executable, "-P", "-c", code, *words], env=env, capture_output=True, text=True, cwd=home
        )


def command(hub: Any, home: Path, *words: str, token: str = ALICE) -> subprocess.CompletedProcess[str]:
    code = "import sys; sys.argv[0] = 'hf-compress'; from hf_compress.cli import main; main()"
    env = environment(hub, token, home)
    return subprocess.run([sys.executable, "-c", code, *words], env=env, capture_output=True, text=True)


def said(ran: subprocess.CompletedProcess[str]) -> Any:
    line = next((x for x in ran.stdout.splitlines() if x.startswith("ANSWER")), None)
    if line is None:
        raise SystemExit(f"a clean process died:\n{ran.stderr[-3000:]}")
    return json.loads(line.removeprefix("ANSWER"))


def round_trip(folder: Path, scratch: Path) -> dict[str, Any]:
    """Everything that must hold of one finished folder; each entry is what was seen."""
    from tests.hub.server import Fault, Hub

    hub, name = Hub({ALICE: "alice", BOB: "bob"}).start(), folder.name
    repo, home = f"alice/{name}", scratch / "home"
    facts = json.loads((folder / "hf_compress.json").read_text())
    task = {"causal-lm": "text-generation"}.get(facts["task"], facts["task"])
    auto = {"text-generation": "AutoModelForCausalLM"}.get(task, "AutoModelForSequenceClassification")
    weights = (folder / "model.safetensors").stat().st_size
    before = said(clean(hub, ANSWERS, str(folder.absolute()), auto, task))
    seen: dict[str, Any] = {"folder": name, "weights_bytes": weights}

    hub.faults.append(Fault("PUT", "/_blobs/", drop=weights // 2, times=10_000))  # every upload, until it gives up
    ran = command(hub, home, "publish", str(folder), repo, "--private")
    seen["interrupted: exit code, commits"] = [ran.returncode, len(hub.repos[repo].commits)]
    hub.faults.clear()
    hub.faults += [Fault("POST", "/commit/", status=500), Fault("POST", "/commit/", drop="after")]
    started = time.time()
    ran = command(hub, home, "publish", str(folder), repo, "--private")
    seen["resumed through a 500 and a lost answer"] = ran.stdout.strip().splitlines()[-1] if ran.stdout else ran.stderr
    seen["publish seconds"] = round(time.time() - started, 1)
    seen["commits"] = len(hub.repos[repo].commits)
    hub.log.clear()
    seen["rerun"] = command(hub, home, "publish", str(folder), repo, "--private").stdout.strip().splitlines()[-1]
    seen["rerun: uploads"] = len(hub.sent("PUT", "/_blobs/")) + len(hub.sent("POST", "/commit/"))
    for words in (("--revision", "v1"), ("--create-pr",)):
        command(hub, home, "publish", str(folder), repo, *words)
    seen["refs"] = sorted(hub.repos[repo].refs)

    after = said(clean(hub, ANSWERS, repo, auto, task))
    largest = max(map(abs, before[0]))
    seen["largest logit difference"] = max(abs(a - b) for a, b in zip(before[0], after[0], strict=True)) / largest
    seen["same pipeline answer"] = before[1] == after[1]
    seen["pipeline said"] = after[1]
    for who, token in (("nobody", ""), ("another user", BOB)):
        ran = clean(hub, ANSWERS, repo, auto, task, token=token)
        seen[f"private, {who}"] = "refused" if ran.returncode else "READ IT"
    card = hub.repos[repo].at("main").files["README.md"].data.decode()
    snippets = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
    seen["snippets run"] = [clean(hub, snippet).returncode for snippet in snippets]
    ran = command(hub, home, "verify", repo)
    seen["verify user/repo"] = ran.stdout.strip().splitlines()[-1] if not ran.returncode else ran.stderr[-1500:]
    from huggingface_hub import ModelCard, constants

    constants.ENDPOINT = hub.url
    ModelCard(card).validate()
    seen["card valid for the Hub client"] = True
    hub.stop()
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
    for made in asked.folders:
        keep_card(made)
        if not asked.cards_only:
            with tempfile.TemporaryDirectory() as room:
                copy = Path(shutil.copytree(made, Path(room) / made.name))
                print(json.dumps(round_trip(copy, Path(room)), indent=2))
