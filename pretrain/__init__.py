"""Recipes, data, optimizers, schedules, and the loop: `train(load_recipe("tiny"))`."""

from rondo.parallel.bounds import keep_bounds
from rondo.pretrain.parse import load_recipe
from rondo.pretrain.recipe import Recipe
from rondo.pretrain.train import train

__all__ = ["Recipe", "keep_bounds", "load_recipe", "train"]
