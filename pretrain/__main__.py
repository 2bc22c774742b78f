"""What torchrun and srun start: `python -m rondo.pretrain RECIPE [--section.key value]...`."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

from rondo.errors import UserError, run_command

_DESCRIPTION = """\
Trains what RECIPE describes: a YAML file, or a recipe that comes with rondo ({bundled}).
Every key can be given here too, and then overrides the file."""


def main(argv: Sequence[str], command: str = "python -m rondo.pretrain") -> int:
    """Trains the recipe that `argv` names. 0: done; 75: stopped after a checkpoint; see also
    `rondo.errors.run_command`."""
    from rondo.pretrain.options import help_text, split_arguments
    from rondo.pretrain.parse import bundled_recipes, load_recipe
    from rondo.pretrain.recipe import Recipe

    usage = f"{command} RECIPE [--section.key value]..."
    if split_arguments(argv).wants_help:
        bundled = ", ".join(sorted(bundled_recipes()))
        print(help_text(Recipe, usage, _DESCRIPTION.format(bundled=bundled)), end="")
        return 0
    if not argv or argv[0].startswith("-"):
        raise UserError(f"which recipe? It comes first: {usage}")
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    recipe = load_recipe(argv[0], argv[1:], world_size=world_size)

    from rondo.pretrain.attempts import process_start
    from rondo.pretrain.train import train

    return train(recipe, process_start())


if __name__ == "__main__":
    sys.exit(run_command(lambda: main(sys.argv[1:])))
