"""The closed world of the scenes: which things exist, in which themes and colors, and what signs say."""

# Within a theme the order is the popularity rank: earlier nouns appear more often (Zipf).
# Each noun is one glyph of Noto Color Emoji, drawn once into the sprite sheet.
THEMES: dict[str, dict[str, str]] = {
    "animal": {
        "dog": "\U0001f436", "cat": "\U0001f431", "horse": "\U0001f40e", "fish": "\U0001f41f",
        "duck": "\U0001f986", "rabbit": "\U0001f430", "turtle": "\U0001f422", "elephant": "\U0001f418",
    },
    "food": {
        "apple": "\U0001f34e", "banana": "\U0001f34c", "pizza": "\U0001f355", "bread": "\U0001f35e",
        "cake": "\U0001f382", "carrot": "\U0001f955", "burger": "\U0001f354", "mushroom": "\U0001f344",
    },
    "vehicle": {
        "car": "\U0001f697", "bus": "\U0001f68c", "bicycle": "\U0001f6b2", "train": "\U0001f682",
        "boat": "\u26f5", "truck": "\U0001f69a", "plane": "\u2708", "rocket": "\U0001f680",
    },
    "tool": {
        "ball": "\u26bd", "book": "\U0001f4d6", "clock": "\u23f0", "key": "\U0001f511",
        "umbrella": "\u2602", "phone": "\U0001f4f1", "camera": "\U0001f4f7", "guitar": "\U0001f3b8",
    },
}  # fmt: skip

NOUNS: tuple[str, ...] = tuple(noun for nouns in THEMES.values() for noun in nouns)
THEME_OF: dict[str, str] = {noun: theme for theme, nouns in THEMES.items() for noun in nouns}
POPULAR: tuple[str, ...] = tuple(noun for nouns in THEMES.values() for noun in list(nouns)[:3])

# What signs say. Three letters each, so that no word is known by its length.
SIGNS: tuple[str, ...] = (
    "tea", "fox", "jam", "kit", "zip", "hub", "oak", "pub", "van", "web", "gym", "ice",
    "log", "map", "net", "owl", "pen", "rug", "sky", "toy", "urn", "wax", "elm", "dip",
)  # fmt: skip

# sRGB tints; far apart, so that a color name is never a matter of taste.
COLORS: dict[str, tuple[int, int, int]] = {
    "red": (232, 38, 38),
    "yellow": (246, 214, 36),
    "green": (44, 180, 58),
    "blue": (48, 98, 238),
    "purple": (172, 58, 204),
    "white": (246, 246, 246),
}
COLOR_NAMES: tuple[str, ...] = tuple(COLORS)
SIDES: tuple[str, ...] = ("left", "right")
HEIGHTS: tuple[str, ...] = ("top", "bottom")
PLACES: tuple[str, ...] = tuple(f"{height} {side}" for height in HEIGHTS for side in SIDES)


def with_article(noun: str) -> str:
    """`"an apple"`, `"a dog"`."""
    return f"{'an' if noun[0] in 'aeiou' else 'a'} {noun}"
