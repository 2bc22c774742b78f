"""The `rondo` command: a thin shell over functions that can be imported.

Only the standard library is imported until a command runs, so that this starts at once, and
works on login nodes where torch is not installed.
"""

from __future__ import annotations

import difflib
import sys
from collections.abc import Callable, Sequence

from rondo.errors import UserError, run_command

_ABOUT = "Pretraining of hybrid recurrent/attention language models."
_USAGE = "rondo [-h] [--version] COMMAND ..."


def main(argv: Sequence[str] | None = None) -> int:
    """Runs `rondo` with the words in `argv` (default: those it was started with).

    Returns the exit code: 0, 2 for bad input, 75 for training that stopped after a checkpoint,
    130 for Ctrl-C.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    return run_command(lambda: _run(words))


def _run(words: list[str]) -> int:
    first = words[0] if words else "--help"
    if first in ("-h", "--help"):
        print(_help())
        return 0
    if first == "--version":
        from rondo import __version__

        print(f"rondo {__version__}")
        return 0
    if first not in _COMMANDS:
        near = difflib.get_close_matches(first, _COMMANDS, n=1)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise UserError(f"unknown command {first!r}{hint} (commands: {', '.join(_COMMANDS)})")
    return _COMMANDS[first](words[1:])


def _help() -> str:
    lines = [f"  {name:10} {command.__doc__}" for name, command in _COMMANDS.items()]
    more = "`rondo COMMAND --help` lists what a command takes."
    return "\n".join([f"usage: {_USAGE}\n\n{_ABOUT}\n\ncommands:", *lines, "", more])


def _prepare(words: list[str]) -> int:
    """Turn text into token files that training reads."""
    from rondo.pretrain.data.prepare import PrepareConfig, prepare
    from rondo.pretrain.options import parse_command

    usage = "rondo prepare --input TEXT --output FOLDER [--option value]..."
    config = parse_command(PrepareConfig, words, usage)
    if config is not None:
        prepare(config)
    return 0


def _train(words: list[str]) -> int:
    """Train what a recipe describes (on several processes: torchrun -m rondo.pretrain)."""
    from rondo.pretrain.__main__ import main as train

    return train(words, "rondo train")


def _launch(words: list[str]) -> int:
    """Start a recipe on this machine, with torchrun or with SLURM, and keep it going."""
    from rondo.launch.start import main as launch

    return launch(words)


def _status(words: list[str]) -> int:
    """List runs: state, steps, loss, speed, goodput, jobs."""
    from rondo.launch.status import main as status

    return status(words)


def _stop(words: list[str]) -> int:
    """End a run after a checkpoint, wherever it runs."""
    from rondo.launch.stop import main as stop

    return stop(words)


def _evals(words: list[str]) -> int:
    """Score the checkpoints of a run as they appear, from outside of it."""
    from rondo.launch.evals import main as evals

    return evals(words)


def _report(words: list[str]) -> int:
    """Show runs on one page of HTML: curves, norms, experts, evals, differences."""
    from rondo.evals.report import main as report

    return report(words)


def _plan(words: list[str]) -> int:
    """Lay a recipe out on any number of GPUs without having them: memory, traffic, time."""
    from rondo.pretrain.plan import main as plan

    return plan(words)


def _anneal(words: list[str]) -> int:
    """Branch an annealed model off a run, which is left as it is."""
    from rondo.pretrain.anneal import main as anneal

    return anneal(words)


def _forgetting(words: list[str]) -> int:
    """Tell what runs in stages have learnt and forgotten: table, JSON, plot."""
    from rondo.evals.forgetting import main as forgetting

    return forgetting(words)


def _compare(words: list[str]) -> int:
    """Train a recipe with several values of a key and several seeds; losses by source."""
    from rondo.pretrain.compare import main as compare

    return compare(words)


def _generate(words: list[str]) -> int:
    """Continue a text with a trained checkpoint."""
    from rondo.pretrain.options import parse_command
    from rondo.pretrain.sample import GenerateConfig, generate_text

    usage = "rondo generate CHECKPOINT [--prompt TEXT] [--option value]..."
    config = parse_command(GenerateConfig, words, usage, ("checkpoint",))
    if config is not None:
        generate_text(config)
    return 0


def _export(words: list[str]) -> int:
    """Write a checkpoint as a Hugging Face model folder."""
    from rondo.pretrain.interchange import ExportConfig, export_checkpoint
    from rondo.pretrain.options import parse_command

    usage = "rondo export CHECKPOINT --output FOLDER [--option value]..."
    config = parse_command(ExportConfig, words, usage, ("checkpoint",))
    if config is not None:
        export_checkpoint(config)
    return 0


def _import(words: list[str]) -> int:
    """Read a Hugging Face model folder into a checkpoint."""
    from rondo.pretrain.interchange import ImportConfig, import_folder
    from rondo.pretrain.options import parse_command

    usage = "rondo import FOLDER --output CHECKPOINT [--option value]..."
    config = parse_command(ImportConfig, words, usage, ("folder",))
    if config is not None:
        import_folder(config)
    return 0


def _eval(words: list[str]) -> int:
    """Score checkpoints: lm-eval's tasks, and ours for recurrent models."""
    from rondo.evals.run import main as evaluate

    return evaluate(words)


_COMMANDS: dict[str, Callable[[list[str]], int]] = {
    "prepare": _prepare,
    "train": _train,
    "launch": _launch,
    "status": _status,
    "stop": _stop,
    "evals": _evals,
    "report": _report,
    "plan": _plan,
    "anneal": _anneal,
    "forgetting": _forgetting,
    "compare": _compare,
    "generate": _generate,
    "export": _export,
    "import": _import,
    "eval": _eval,
}

if __name__ == "__main__":
    sys.exit(main())
