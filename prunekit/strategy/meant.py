"""What people type where a fraction, layers or a site are wanted, and how a pipeline file says it."""

from __future__ import annotations

import re

RANGE = re.compile(r"\s*(\d{1,4})\s*(?:-|\.\.+|:|–|to)\s*(\d{1,4})\s*")
LISTED = re.compile(r"\s*\d{1,4}(?:\s*[,;]?\s+\d{1,4}|\s*[,;]\s*\d{1,4})+\s*")
PER_CENT = re.compile(r"\s*(\d{1,3}(?:[.,]\d+)?)\s*(?:%|per ?cent|percent)\s*")
COMMA = re.compile(r"\s*([01]),(\d+)\s*")
SHARE = re.compile(r"\s*(\d{1,4})\s*/\s*(\d{1,4})\s*")
NUMBER = re.compile(r"\s*\d*\.?\d+(?:e-?\d+)?\s*")
LAYER = re.compile(r"\s*(?:(?:before|layers?|blocks?|l)[\s_.:-]*)*\[?\s*(\d{1,4})\s*\]?\s*", re.IGNORECASE)
FULL = 40  # numbers that a hint writes out


def fraction(text: str) -> str:
    """A hint for words where a fraction in (0, 1] is wanted; empty for what says no such number."""
    if match := PER_CENT.fullmatch(text):
        value = float(match[1].replace(",", ".")) / 100
    elif match := COMMA.fullmatch(text):
        value = float(f"{match[1]}.{match[2]}")
    elif match := SHARE.fullmatch(text):
        value = int(match[1]) / int(match[2]) if int(match[2]) else 0.0
    else:
        return "remove the quotes" if NUMBER.fullmatch(text) else ""
    return f"write {value:.4g}" if 0 < value <= 1 else ""


def numbers(text: str, inside: bool = False) -> str:
    """A hint for words where a list of whole numbers is wanted: a range, or numbers between commas.

    inside: they are one entry of a list.
    """
    if match := RANGE.fullmatch(text):
        first, last = int(match[1]), int(match[2])
        if first > last:
            return ""
        every = range(first, last + 1)
        shown = ", ".join(map(str, every)) if len(every) <= FULL else f"{first}, {first + 1}, ..., {last}"
        return f"write every number: {shown if inside else f'[{shown}]'}"
    if LISTED.fullmatch(text):
        shown = ", ".join(re.findall(r"\d+", text))
        return f"write {shown if inside else f'[{shown}]'}"
    return ""


def site(value: object) -> str:
    """A hint for what is no site: a layer by another name, or one that is counted from the end."""
    if isinstance(value, int) and not isinstance(value, bool) and value < 0:
        return f"layers are counted from the first one, 0: of 32 layers {value} is {32 + value}" if value > -32 else ""
    match = LAYER.fullmatch(value) if isinstance(value, str) else None
    return f"write {match[1]}" if match else ""


def whole(value: object) -> str:
    """A hint for a number that should be a whole one."""
    if isinstance(value, float) and value.is_integer():
        return f"write {int(value)}"
    return "remove the quotes" if isinstance(value, str) and value.strip().isdecimal() else ""
