"""hf-compress: run, plan, evaluate, verify, card, publish, compare, cache-teacher, env, list."""

from __future__ import annotations

import logging
import os
import shlex
import sys
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich import box
from rich.markup import escape
from rich.padding import Padding
from rich.panel import Panel
from rich.table import Table

from hf_compress.cli_env import env
from hf_compress.terminal import console, errors

if TYPE_CHECKING:
    from hf_compress.hub import Published
    from hf_compress.remeasure import Figure

app = typer.Typer(
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
    rich_markup_mode="markdown",
    help="Make Transformers models smaller and faster: pruning, distillation and quantization, alone or together.",
)
app.add_typer(env, name="env")
LISTS = (
    "losses, criteria, solvers, backends, families, techniques, stages or recipes; or a section of a recipe: model, "
    "data, evaluate, publish, distill, qat, prune-in-training, or a stage (shrink, prune, train, cache, quantize, "
    "export); or one of the names, such as alps, or of the keys, such as group_size; none = all of these names"
)
RecipeArgument = Annotated[
    str, typer.Argument(help="a recipe file, or the name of a shipped recipe (see `hf-compress list recipes`)")
]
Overrides = Annotated[
    list[str] | None, typer.Option("--set", help="change the recipe: path=value, e.g. stages.distil.args.max_steps=10")
]
FolderArgument = Annotated[Path, typer.Argument(help="a folder that `hf-compress run` finished")]


@app.command()
def run(
    recipe: RecipeArgument,
    output: Annotated[Path, typer.Option(help="folder to make; must not exist yet")],
    set_: Overrides = None,
    overwrite: Annotated[bool, typer.Option(help="replace the output folder")] = False,
) -> None:
    """Run a recipe: stages, measurements, verification, card, and the Hub where it has a `publish:` section.
    Interrupted? The same command goes on where it stopped."""
    from hf_compress.finished import work_folder
    from hf_compress.pipeline import compress
    from hf_compress.recipe import load

    try:
        result = compress(
            load(recipe, set_),
            output,
            overwrite=overwrite,
            command=shlex.join(["hf-compress", *sys.argv[1:]]),
            say=lambda text: console.print(f"[bold]> {text}[/bold]"),
        )
    except KeyboardInterrupt:  # caught here, since typer would end without a word
        errors.print(f"\ninterrupted: run the same command again to go on (work so far: {work_folder(output)})")
        raise typer.Exit(130) from None
    _show(result.facts)
    console.print(f"\ncard: {result.folder / 'README.md'}")
    if result.published is not None:
        _tell(result.published)


@app.command()
def plan(recipe: RecipeArgument, set_: Overrides = None) -> None:
    """Print what a recipe would do, from the model's config alone: parameters, bytes, coverage, notes. Exit code 1
    where something of it will be refused."""
    from hf_compress.planning import REFUSED
    from hf_compress.planning import plan as plan_recipe
    from hf_compress.recipe import load

    rows = plan_recipe(load(recipe, set_))
    table = Table("stage", title=f"plan of {recipe}", title_justify="left", box=box.SIMPLE_HEAD)
    for name in ("parameters", "active", "bytes", "x smaller", "covered", "experts"):
        table.add_column(name, justify="right")
    for row in rows:
        shares = ("-" if value is None else f"{value:.1%}" for value in (row.share, row.experts))
        ratio = f"{rows[0].bytes / row.bytes:.2f}"
        cells = (f"{row.parameters / 1e6:,.1f} M", f"{row.active / 1e6:,.1f} M", f"{row.bytes / 1e6:,.1f} MB", ratio)
        table.add_row(row.name if row.name == row.kind else f"{row.name} ({row.kind})", *cells, *shares)
    console.print(table)
    for row in rows:
        for note in row.notes:
            style = "bold red" if note.startswith(REFUSED) else None
            console.print(f"  {row.name}: {note}", markup=False, style=style)
    if any(note.startswith(REFUSED) for row in rows for note in row.notes):
        raise typer.Exit(1)


@app.command()
def evaluate(
    folder: FolderArgument,
    dense: Annotated[
        str | None, typer.Option(help="measure again, here and now, against this dense model (a folder or a Hub id)")
    ] = None,
) -> None:
    """Print what was measured when the folder was made; with --dense, measure again and renew the card."""
    from hf_compress.card import read_facts
    from hf_compress.pipeline import measure_again

    _show(read_facts(folder) if dense is None else measure_again(folder, dense))


@app.command()
def verify(
    folder: Annotated[str, typer.Argument(help="a folder that `hf-compress run` finished, or user/repo on the Hub")],
    revision: Annotated[str | None, typer.Option(help="branch, tag or commit on the Hub")] = None,
    remeasure: Annotated[bool, typer.Option(help="measure what the card says again (its data must be here)")] = False,
    dense: Annotated[str | None, typer.Option(help="with --remeasure: the dense model, for KL and agreement")] = None,
) -> None:
    """Compare every file with its recorded hash, open the folder in a fresh process without hf_compress and compare
    its answers with those recorded, and its card with its facts."""
    from hf_compress.card import FACTS, differing_sections
    from hf_compress.errors import CompressError, did_you_mean
    from hf_compress.hub import fetch
    from hf_compress.remeasure import remeasure as measure
    from hf_compress.verification import verify as verify_folder

    here = Path(folder).exists() or folder.count("/") != 1
    if not here and (beside := Path(folder).parent).is_dir():
        hint = did_you_mean(Path(folder).name, (path.name for path in beside.iterdir() if path.is_dir()))
        if hint.startswith("did you mean"):  # else a repository, of an owner whose name a folder here has
            raise CompressError(f"the folder {beside} holds no {Path(folder).name!r}", where=folder, next_step=hint)
    repo = None if here else folder
    path = fetch(repo, revision=revision) if repo else Path(folder)
    for key, value in verify_folder(path)[str(path)].items():
        console.print(f"{key}: {value}", markup=False)
    if (path / FACTS).exists() and (wrong := differing_sections(path, repo=repo)):
        raise CompressError(
            f"the card does not say what {FACTS} says: {', '.join(wrong)}",
            where=str(path / "README.md"),
            next_step="do not trust its numbers; `hf-compress card FOLDER` writes it again",
        )
    if remeasure:
        _compare(measure(path, dense=dense))
    console.print("ok: it opens without hf_compress and answers as recorded")


def _compare(figures: list[Figure]) -> None:
    from hf_compress.errors import CompressError

    table = Table("of", "figure", box=box.SIMPLE_HEAD)
    for name in ("on the card", "here", ""):
        table.add_column(name, justify="right")
    for f in figures:
        table.add_row(f.artefact, f.name, f"{f.card:.6g}", f"{f.here:.6g}", "" if f.same else "differs")
    console.print(table)
    if not all(figure.same for figure in figures):
        raise CompressError(
            "the card's numbers are not what this machine finds",
            where=", ".join(f"{f.artefact} {f.name}" for f in figures if not f.same),
            next_step="compare the versions in the card with those here",
        )


@app.command()
def publish(
    folder: FolderArgument,
    repo: Annotated[str, typer.Argument(help="where to: user/name or organisation/name; made when it is not there")],
    private: Annotated[bool, typer.Option(help="make a new repository private")] = False,
    revision: Annotated[str | None, typer.Option(help="branch to commit to, made when there is none")] = None,
    create_pr: Annotated[bool, typer.Option(help="open a pull request instead of committing to main")] = False,
) -> None:
    """Verify the folder and commit it to the Hub in one piece, its card (README.md) with it.

    Log in first with `hf auth login`, or set HF_TOKEN. Interrupted? The same command sends what is missing.

    `hf-compress publish outputs/small my-org/small --private`
    """
    from hf_compress.hub import publish as publish_folder

    done = publish_folder(
        folder,
        repo,
        private=private,
        revision=revision,
        create_pr=create_pr,
        say=lambda text: console.print(f"[bold]> {escape(text)}[/bold]"),
    )
    _tell(done)


def _tell(done: Published) -> None:
    if not done.changed:
        console.print(f"nothing to upload: {done.repo} holds all of it already (commit {done.commit})", markup=False)
    else:
        console.print(f"published: {done.pull_request or f'{done.repo}, commit {done.commit}'}", markup=False)


@app.command()
def card(folder: FolderArgument) -> None:
    """Write the card again from the folder's facts."""
    from hf_compress.card import write_card

    console.print(str(write_card(folder)))


@app.command()
def compare(
    folders: Annotated[list[Path], typer.Argument(help="two or more finished folders made from one model")],
    output: Annotated[Path | None, typer.Option(help="also write the table as Markdown, to a file")] = None,
) -> None:
    """Print several variants of one model side by side, as each was measured."""
    from hf_compress.card import variants, variants_card

    console.print(_table(variants(folders), "variants"))
    if output is not None:
        output.write_text(variants_card(folders))
        console.print(str(output), markup=False)


@app.command("cache-teacher")
def cache_teacher(
    recipe: RecipeArgument,
    output: Annotated[Path, typer.Option(help="folder to fill; run again to go on after an interruption")],
    teacher: Annotated[str | None, typer.Option(help="folder or Hub id; none: the recipe's model")] = None,
    kind: Annotated[str, typer.Option(help="samples: unbiased draws; topk: the likeliest and a tail")] = "samples",
    samples: Annotated[int, typer.Option(help="draws, or likeliest classes, at each position")] = 12,
    temperature: Annotated[float, typer.Option(help="the `temperature` of the training that will use it")] = 2.0,
    part: Annotated[str, typer.Option(help="i/n: every n-th shard from the i-th, for n processes at once")] = "0/1",
    set_: Overrides = None,
) -> None:
    """Write a teacher's answers to a recipe's training data, for `distill: {teacher_cache: FOLDER}`."""
    from dataclasses import replace

    from hf_compress.data import prepare
    from hf_compress.errors import CompressError
    from hf_compress.recipe import load
    from hf_compress.source import load_tokenizer, read_config
    from hf_compress.teacher_cache import bytes_of, cache_teacher

    loaded = load(recipe, set_)
    numbers = part.split("/")
    if loaded.data is None or len(numbers) != 2 or not all(number.isdigit() for number in numbers):
        raise CompressError(
            "the recipe has no data" if loaded.data is None else f"--part {part!r} is not i/n",
            where="cache-teacher",
            next_step="add a `data:` section" if loaded.data is None else "--part 0/4 to --part 3/4",
        )
    source = loaded.model
    if teacher is not None:  # the rest of `model:` is about another repository
        source = replace(source, id=teacher, config=None, tokenizer=None, revision=None, gguf_file=None)
    read_config(source)
    students, its_own = load_tokenizer(loaded.model), load_tokenizer(source)
    tokenizer = students or its_own
    if tokenizer is None:
        raise CompressError(
            "neither the recipe's model nor the teacher has a tokenizer",
            where="cache-teacher",
            next_step="set model.tokenizer",
        )
    if its_own is not None and its_own.get_vocab() != tokenizer.get_vocab():
        raise CompressError(
            "the teacher has another tokenizer than the recipe's model, which could not learn from its answers",
            where=f"--teacher {teacher}",
            next_step="use a teacher of the same tokenizer",
        )
    cache_teacher(
        source,
        prepare(loaded.data, tokenizer, task="causal-lm"),
        tokenizer,
        output,
        kind=kind,
        samples=samples,
        temperature=temperature,
        seed=loaded.seed,
        part=(int(numbers[0]), int(numbers[1])),
        vocabulary=read_config(loaded.model).get_text_config().vocab_size,
        say=lambda text: console.print(f"[bold]> {text}[/bold]"),
    )
    console.print(f"{bytes_of(output) / 1e6:.1f} MB: distill: {{teacher_cache: {output}, temperature: {temperature}}}")


@app.command("list")
def list_(
    what: Annotated[str | None, typer.Argument(help=LISTS)] = None,
) -> None:
    """Name, one line and paper of everything of a kind; keys, meaning and default of a section of a recipe; or what
    something of that name does and takes."""
    from hf_compress.listing import explained, keys, listing, overview

    if what is None:
        table = Table("what", "names", box=None)
        for kind, names in overview():
            table.add_row(kind, escape(names))
        console.print(table)
        return
    found = explained(what)
    for text in (paragraph for entry in found for paragraph in [*entry, ""]):
        console.print(Padding(escape(text.strip()), (0, 0, 0, len(text) - len(text.lstrip()))), highlight=False)
    rows = keys(what) if found else listing(what)
    if not rows:
        return
    table = Table("name", "what", "paper or default", box=None)
    for row in rows:
        table.add_row(*map(escape, row))
    console.print(table)


def _show(facts: dict[str, object]) -> None:
    from hf_compress.card import comparison

    rows = comparison(facts["evaluation"])  # type: ignore[arg-type]
    if not rows:
        console.print("the recipe measured nothing (no evaluate: section)")
        return
    console.print(_table(rows, str(facts["name"])))


def _table(rows: list[list[str]], title: str) -> Table:
    """The first row is the header; figures stand to the right."""
    table = Table(title=escape(title), title_justify="left", box=box.SIMPLE_HEAD)
    for index, name in enumerate(rows[0]):
        table.add_column(escape(name), justify="left" if index == 0 else "right", no_wrap=index == 0)
    for row in rows[1:]:
        table.add_row(*row)
    return table


def main() -> None:
    """The console script: what a person can mend is a short panel and exit code 1, Ctrl-C is 130."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("BITSANDBYTES_NOWELCOME", "1")
    warnings.filterwarnings("ignore", category=FutureWarning)
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    import transformers
    from safetensors import SafetensorError

    from hf_compress.errors import CompressError

    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    try:
        app()
    except CompressError as error:
        errors.print(Panel(str(error), title="hf-compress", title_align="left", border_style="red"), markup=False)
        sys.exit(1)
    except (OSError, SafetensorError) as error:  # safetensors reports a full disk as its own kind
        damaged = isinstance(error, SafetensorError) and "os error" not in str(error)
        mend = "copy or download the damaged file again" if damaged else "free space or choose another place"
        text = f"{error}\n  next: {mend}, then run the same command again to go on"
        errors.print(Panel(text, title="hf-compress", title_align="left", border_style="red"), markup=False)
        sys.exit(1)


if __name__ == "__main__":
    main()
