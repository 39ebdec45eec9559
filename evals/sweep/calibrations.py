"""The files that a sweep's pipelines need of `prunekit calibrate`: made before anything else, each once."""

from __future__ import annotations

import argparse

from prunekit_evals.sweep.spec import Calibration, SweepSpec


def missing(spec: SweepSpec) -> list[Calibration]:
    """Those that are not there."""
    return [one for one in spec.calibrations if not one.out.is_file()]


def make(spec: SweepSpec, one: Calibration, download: bool) -> None:
    """One file, with the sweep's model as the sweep loads it. Raises what `prunekit calibrate` raises."""
    from prunekit.cli import calibrate

    model = spec.models[0]
    one.out.parent.mkdir(parents=True, exist_ok=True)
    calibrate.run(
        argparse.Namespace(
            pipeline=one.source, overrides=[], stage=None, model=model.model, data=one.data, out=one.out,
            prompts=one.prompts, seed=one.seed, dtype=model.dtype, device=None, attn=model.attn, download=download,
            json=False,
        )
    )  # fmt: skip
