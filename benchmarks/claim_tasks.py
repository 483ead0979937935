"""Tasks of `claims.py`: two that SmolLM2-135M fails at and does not learn to the end in a hundred steps, and what it may forget.

    arithmetic   Anna has 23 apples …  →   23 + 18 = 41; 41 - 7 = 34. Answer: 34
    sorting      Words: pear, fig, …   →   apple, fig, kiwi, pear

Training data are limited: `POOL` distinct rows, gone through again and again. Held-out rows never occur in training (by a hash of the
question). `forgetting`: the loss on the `help()` topics of Python, and on the other task, which is not trained.
"""

from __future__ import annotations

import hashlib
import random
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from sparsify.demo.language_tasks import LanguageTask, Row

POOL = 400
NAMES = ("Anna", "Ben", "Clara", "David", "Emma", "Frank", "Grace", "Henry", "Iris", "Jack", "Kate", "Leo")
THINGS = ("apples", "books", "coins", "stamps", "cards", "pens", "shells", "stones", "eggs", "cakes", "keys", "tickets")
WORDS = ["apple", "arrow", "baker", "beach", "bench", "berry", "bird", "boat", "bone", "book", "bottle", "branch", "bread", "bridge", "brush", "bucket", "button", "cabin", "cable", "camel", "candle", "carpet", "castle", "chain", "chair", "cheese", "cherry", "circle", "clock", "cloud", "coat", "copper", "corn", "cotton", "cousin", "cream", "crown", "curtain", "daisy", "desert", "door", "dragon", "drawer", "drum", "eagle", "engine", "farmer", "feather", "fence", "finger", "fish", "flag", "flower", "forest", "fork", "fox", "frog", "garden", "gate", "ghost", "giant", "glass", "glove", "goat", "grape", "grass", "hammer", "harbor", "hat", "hill", "honey", "horse", "house", "island", "jacket", "jar", "jewel", "judge", "juice", "kettle", "key", "king", "kitchen", "kite", "ladder", "lake", "lamp", "leaf", "lemon", "letter", "lion", "lizard", "lunch", "machine", "magnet", "market", "mask", "meadow", "melon", "mirror", "monkey", "moon", "mountain", "mouse", "museum", "nail", "needle", "nest", "nose", "nurse", "oak", "ocean", "onion", "orange", "oven", "owl", "paint", "palace", "paper", "parrot", "peach", "pencil", "pepper", "piano", "picture", "pillow", "planet", "plate", "pocket", "pond", "potato", "prince", "pumpkin", "queen", "rabbit", "rain", "ribbon", "river", "robot", "rocket", "roof", "rope", "rose", "saddle", "salt", "school", "scissors", "shadow", "sheep", "ship", "shoe", "silver", "skirt", "snake", "soap", "sofa", "spider", "spoon", "square", "star", "station", "stone", "storm", "street", "sugar", "sun", "swan", "table", "tailor", "temple", "tiger", "tower", "train", "tree", "trumpet", "tunnel", "turtle", "umbrella", "uncle", "valley", "vase", "village", "violin", "wagon", "wall", "water", "whale", "wheel", "window", "winter", "wolf", "wood", "yard", "zebra"]  # fmt: skip


def arithmetic_row(draw: random.Random) -> Row:
    """Two steps of addition, subtraction or multiplication by a small number, with the working written out."""
    name, thing = draw.choice(NAMES), draw.choice(THINGS)
    start = draw.randrange(12, 90)
    said, working, value = [f"{name} has {start} {thing}"], [], start
    for _ in range(2):
        kind = draw.choice(["more", *(["less"] if value > 4 else []), *(["times"] if value < 100 else [])])
        if kind == "more":
            n = draw.randrange(3, 60)
            said.append(draw.choice((f"finds {n} more", f"buys {n} more", f"gets {n} from a friend")))
            working.append(f"{value} + {n} = {value + n}")
            value += n
        elif kind == "less":
            n = draw.randrange(2, value)
            said.append(draw.choice((f"loses {n}", f"gives {n} away", f"sells {n}")))
            working.append(f"{value} - {n} = {value - n}")
            value -= n
        else:
            n = draw.randrange(2, 5)
            said.append(f"then has {n} times as many")
            working.append(f"{value} * {n} = {value * n}")
            value *= n
    question = f"{said[0]}, {said[1]} and {said[2]}. How many are there now?"
    return f"Question: {question}\nWorking:", f" {'; '.join(working)}. Answer: {value}"


def sorting_row(draw: random.Random) -> Row:
    """Five to seven words in alphabetical order."""
    words = draw.sample(WORDS, draw.randrange(5, 8))
    return f"Words: {', '.join(words)}\nSorted:", " " + ", ".join(sorted(words))


ARITHMETIC = LanguageTask("arithmetic", "word problems with working", arithmetic_row)
SORTING = LanguageTask("sorting", "words in alphabetical order", sorting_row)
TASKS = {task.name: task for task in (ARITHMETIC, SORTING)}
OTHER = {"arithmetic": SORTING, "sorting": ARITHMETIC}


def pool(task: LanguageTask, seed: int, size: int = POOL) -> list[Row]:
    """The training rows that a run may see."""
    return task.distinct(seed, size)


def digest(task: LanguageTask) -> str:
    """A short hash of the rows that a task makes: numbers on other rows are no numbers of this task."""
    rows = task.distinct(0, 50) + task.distinct(0, 50, held_out=True)
    return hashlib.sha256(repr(rows).encode()).hexdigest()[:12]


def batches(rows: Sequence[Row], steps: int, batch: int, seed: int) -> list[list[Row]]:
    """The rows of every step, epoch after epoch in new orders: the same for all methods of a seed."""
    order, found, left = random.Random(f"order {seed}"), [], []
    while len(found) < steps:
        if len(left) < batch:
            left = list(rows)
            order.shuffle(left)
        found.append([left.pop() for _ in range(batch)])
    return found
