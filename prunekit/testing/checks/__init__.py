"""The rules of the contract, by subject. A rule is one function; `prunekit.testing.contract` runs those that concern a
strategy.
"""

from __future__ import annotations

from prunekit.testing.check import Check
from prunekit.testing.checks import budgets, declared, exact, half, independent, other_stages, traceless

CHECKS: tuple[Check, ...] = (
    declared.model, declared.source, declared.frozen, declared.yaml_round_trip,
    exact.prefill, exact.decoding, exact.kv_lengths, exact.sites, exact.skipped_layers, exact.videos,
    budgets.keep, budgets.keep_all, budgets.without_keep, budgets.drops_all, budgets.text_stays,
    budgets.plan, budgets.keep_layers, budgets.one_size, budgets.smaller_images,
    independent.same_result, independent.rows_alone, independent.no_image,
    traceless.inputs_unchanged, traceless.nothing_left, traceless.nothing_left_after_an_exception,
    other_stages.after_others, other_stages.before_others,
    half.finite, half.half_precision,
)  # fmt: skip
