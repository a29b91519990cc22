"""The words of the demo world: synonyms of every value, and off-topic words for the evaluation.

The first synonym of each value is the plainest. No synonym belongs to two values.
"""

from __future__ import annotations

from types import MappingProxyType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping

# fmt: off
_SHAPE = {
    "circle": ("circle", "circles", "circular", "round", "disc", "discs", "disk", "disks", "ball",
               "balls", "sphere", "spherical", "rounded", "circle-shaped"),
    "oval": ("oval", "ovals", "ellipse", "ellipses", "elliptical", "egg", "egg-shaped", "oblong",
             "oval-shaped"),
    "square": ("square", "squares", "box", "boxes", "cube", "cubes", "cubic", "boxy",
               "square-shaped"),
    "rectangle": ("rectangle", "rectangles", "rectangular", "bar", "bars", "slab", "slabs",
                  "rectangle-shaped"),
    "triangle": ("triangle", "triangles", "triangular", "pyramid", "pyramids", "three-sided",
                 "triangle-shaped", "wedge", "wedges"),
    "star": ("star", "stars", "star-shaped", "starry", "pentagram", "pentagrams", "five-pointed"),
    "heart": ("heart", "hearts", "heart-shaped", "valentine", "valentines", "love heart"),
    "cross": ("cross", "crosses", "cross-shaped", "plus", "plus sign", "plus signs", "plus-shaped"),
    "crescent": ("crescent", "crescents", "moon", "moons", "crescent-shaped", "half-moon",
                 "moon-shaped", "sickle"),
    "arrow": ("arrow", "arrows", "arrow-shaped", "pointer", "pointers", "arrowhead", "arrowheads"),
}
_COLOUR = {
    "red": ("red", "crimson", "scarlet", "reddish", "ruby", "cherry", "red-colored", "reds"),
    "orange": ("orange", "tangerine", "amber", "orangish", "pumpkin", "orange-coloured", "apricot"),
    "yellow": ("yellow", "gold", "golden", "lemon", "yellowish", "yellow-colored", "mustard"),
    "green": ("green", "emerald", "lime", "greenish", "jade", "green-coloured", "forest green"),
    "blue": ("blue", "navy", "azure", "bluish", "cobalt", "sapphire", "blue-colored", "indigo"),
    "purple": ("purple", "violet", "lilac", "purplish", "plum", "lavender", "purple-coloured"),
    "pink": ("pink", "rose", "rosy", "pinkish", "magenta", "fuchsia", "pink-colored", "salmon"),
    "brown": ("brown", "chocolate", "brownish", "tan", "coffee", "chestnut", "brown-coloured"),
    "black": ("black", "ebony", "jet black", "blackish", "charcoal", "black-colored", "inky"),
    "white": ("white", "ivory", "snowy", "whitish", "cream", "white-coloured", "snow white"),
}
_TEXTURE = {
    "plain": ("plain", "smooth", "solid", "flat", "blank", "unpatterned", "clean", "sleek"),
    "striped": ("striped", "stripes", "stripe", "stripy", "lined", "lines", "banded", "linear"),
    "dotted": ("dotted", "dots", "polka dot", "polka-dotted", "spotted", "spots", "spotty"),
    "checkered": ("checkered", "checks", "chequered", "checked", "checkerboard", "chessboard",
                  "checker"),
    "zigzag": ("zigzag", "zigzags", "chevron", "chevrons", "jagged", "zig-zag", "wavy", "waves"),
    "grid": ("grid", "grids", "mesh", "lattice", "crosshatched", "plaid", "netted", "woven"),
    "speckled": ("speckled", "speckles", "grainy", "rough", "noisy", "gritty", "sandy", "bumpy",
                 "coarse"),
    "ringed": ("ringed", "rings", "concentric", "target", "bullseye", "spiral", "swirl"),
    "gradient": ("gradient", "gradients", "fading", "shaded", "faded", "ombre", "gradual",
                 "shading"),
    "marbled": ("marbled", "marble", "blotchy", "patchy", "mottled", "camouflage", "patches",
                "blotches"),
}
_COUNT = {
    "1": ("one", "1", "single", "lone", "only one", "one single", "solitary"),
    "2": ("two", "2", "pair", "a pair", "couple", "double", "twin", "two of them"),
    "3": ("three", "3", "trio", "triple", "a trio", "three of them"),
    "4": ("four", "4", "quartet", "quadruple", "four of them"),
    "5": ("five", "5", "quintet", "a group of five", "five of them"),
    "6": ("six", "6", "sextet", "half a dozen", "six of them"),
    "7": ("seven", "7", "septet", "seven of them", "a group of seven"),
    "8": ("eight", "8", "octet", "eight of them", "a group of eight"),
    "9": ("nine", "9", "nonet", "nine of them", "a group of nine"),
    "10": ("ten", "10", "ten of them", "a group of ten", "a set of ten"),
}
_BACKGROUND = {
    "studio": ("on grey", "against a grey backdrop", "grey studio backdrop", "on a gray backdrop"),
    "sand": ("on sand", "at the beach", "on a beige ground", "in the desert"),
    "sky": ("in the sky", "against the sky", "sky backdrop", "among clouds"),
    "grass": ("on grass", "on the lawn", "in a meadow", "grassy ground"),
    "wood": ("on wood", "on a wooden table", "wooden ground", "on planks"),
    "concrete": ("on concrete", "on asphalt", "on the pavement", "on stone"),
}
_SIZE = {
    "small": ("small", "little", "tiny"),
    "medium": ("medium", "medium-sized", "mid-sized"),
    "large": ("large", "big", "huge"),
}

OFF_TOPIC = (
    "justice", "monday", "saxophone", "parliament", "algebra", "giraffe", "invoice", "whisper",
    "volcano", "keyboard", "mortgage", "penguin", "kitchen", "harvest", "rumour", "bicycle",
    "oxygen", "election", "novel", "umbrella", "dentist", "courage", "tractor", "symphony",
    "passport", "elephant", "grammar", "satellite", "blanket", "democracy", "rhythm", "airport",
    "pepper", "courtroom", "velocity", "librarian", "hamster", "ballet", "receipt", "insurance",
    "tornado", "poetry", "wallet", "diplomat", "sandwich", "telescope", "gravity", "orchestra",
    "broccoli", "calendar", "jealousy", "pilot", "cathedral", "hockey", "vaccine", "lawyer",
    "sausage", "hurricane", "mathematics", "trumpet", "squirrel", "warranty", "nostalgia", "tunnel",
)
# fmt: on
"""Words that say nothing about any image. They do not occur in training."""

SYNONYMS: Mapping[str, Mapping[str, tuple[str, ...]]] = MappingProxyType(
    {
        "shape": _SHAPE,
        "colour": _COLOUR,
        "texture": _TEXTURE,
        "count": _COUNT,
        "background": _BACKGROUND,
        "size": _SIZE,
    }
)
"""Synonyms of each value, by factor and value, the plainest first."""
