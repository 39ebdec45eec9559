"""The contract of a strategy, as a test class that pytest collects. In a test file of the strategy's own package:

    from prunekit.testing import StrategyContract

    class TestCorner(StrategyContract):
        use = "corner"
        options = {"corner": "top-left"}

That is all: the name must be registered (through the entry-point group, or `prunekit.plugins.register`). The class runs
the strategy on a tiny random LLaVA in float64, as deep as its default sites need, on batches with left padding, several
images and rows without any; where patches leave before the tower, on one with a tower for images of any size; if it
looks at videos, also on a model that takes them. Which rules there are follows from the strategy:
`prunekit.testing.checks`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, ClassVar, Literal
from unittest import SkipTest

from prunekit import Pipeline, families, plugins
from prunekit.errors import InputError, PrunekitError, SpecError, did_you_mean
from prunekit.testing.check import Check
from prunekit.testing.checks import CHECKS
from prunekit.testing.subject import Subject, Traits
from prunekit.testing.tiny import TinyWords, row_of, tiny_inputs, tiny_llava

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

# What a subclass may say.
SAID = ("use", "options", "keep", "at_most", "may_keep_more", "without", "model", "inputs", "row", "processor")
# Layers of decoder and tower of the models that are tried, until the strategy's sites fit.
DEPTHS = ((6, 3), (12, 3), (6, 13), (28, 3), (28, 26), (40, 28))


class StrategyContract:
    """What holds for every strategy; subclass it under a name that begins with `Test`.

    use: its registered name. options: the YAML keys that it needs, beside `use`, `at` and `keep`.
    keep: the budget of the rules that need just one; None is a usual one, {} none, for a strategy that may decide by
    itself.
    at_most: it may leave fewer tokens than asked for, as a pool that rounds down to a grid. may_keep_more: it may leave
    more, as a budget that it takes for a target. With both the count is its own.
    without: rules that it is not held to, each with the reason.
    """

    use: ClassVar[str]
    options: ClassVar[Mapping[str, Any]] = {}
    keep: ClassVar[Mapping[str, Any] | None] = None
    at_most: ClassVar[bool] = False
    may_keep_more: ClassVar[bool] = False
    without: ClassVar[Mapping[str, str]] = {}

    def model(self) -> PreTrainedModel:
        """A stock model in float64; override it, and `inputs` and `row`, to hold the strategy to it on another."""
        tower: Literal["clip", "pixtral"] = "pixtral" if Traits.of(self._class()).pixels else "clip"
        pipeline = Subject(self).build()
        for layers, blocks in DEPTHS:
            model = tiny_llava(tower=tower, layers=layers, blocks=blocks)
            try:
                pipeline.bind(families.shape_of(model))
            except SpecError:
                continue
            return model
        return tiny_llava(tower=tower)  # whose refusal the rule `model` shows

    def inputs(self, **rows: Any) -> dict[str, Tensor]:
        """A prompt batch for that model, of `images` and `text` as `tiny_inputs` takes them."""
        return tiny_inputs(**rows, sizes=Traits.of(self._class()).pixels)

    def row(self, inputs: Mapping[str, Tensor], row: int) -> dict[str, Tensor]:
        """Row `row` of such a batch as a batch of its own, without padding."""
        return row_of(dict(inputs), row)

    def processor(self) -> Any:
        """What reads the prompt as text, for strategies that ask for `question`; that of another model is its own."""
        return TinyWords()

    def build(self, **keys: Any) -> Pipeline:
        """A pipeline of this strategy alone; `keys` such as `at` and `keep` replace the usual ones."""
        return Subject(self).build(**keys)

    @classmethod
    def rules(cls) -> tuple[Check, ...]:
        """The rules that concern the strategy. Raises InputError for one in `without` that there is not, and for a
        class that names no strategy or misspells what it says; UnknownName for a name that nothing registered.
        """
        cls._check_names()
        names = [one.name for one in CHECKS]
        for name in (one for one in cls.without if one not in names):
            near = did_you_mean(name, names)
            raise InputError(f"{cls.__name__}.without names '{name}', which is no rule ({near}{', '.join(names)})")
        traits = Traits.of(cls._class())
        return tuple(one for one in CHECKS if one.concerns(traits) and one.name not in cls.without)

    def pytest_generate_tests(self, metafunc: Any) -> None:
        """One test for each rule."""
        if metafunc.definition.originalname == "test_contract":
            rules = _told(self.rules)
            metafunc.parametrize("rule", rules, ids=[one.name for one in rules])

    def test_contract(self, rule: Check) -> None:
        """The strategy keeps this rule."""
        self.hold(rule)

    def hold(self, rule: Check) -> None:
        """Raises ContractFailure where the strategy breaks the rule. What earlier rules ran is not run again.

        Where it does not fit the contract's model, the rule `model` fails; others raise SkipTest, which pytest knows.
        """
        __tracebackhide__ = True
        subject = type(self).__dict__.get("_subject")
        if subject is None or subject.options != dict(self.options):
            subject = Subject(self)
            type(self)._subject = subject  # type: ignore[attr-defined]
        if subject.misfit and rule is not CHECKS[0]:
            raise SkipTest(f"as the rule `{CHECKS[0].name}` says, '{subject.use}' does not fit the contract's model")
        try:
            rule(subject)
        except BaseException:
            del type(self)._subject  # type: ignore[attr-defined]  # the model may not be as it was
            raise

    @classmethod
    def _check_names(cls) -> None:
        said = "say `use = ...` in it, the name that `prunekit list strategies` shows"
        if not isinstance(getattr(cls, "use", None), str):
            raise InputError(f"{cls.__name__} names no strategy: {said}")
        own = {name for base in cls.__mro__ if base is not StrategyContract for name in vars(base)}
        for name in sorted(own - {*dir(StrategyContract), *SAID}):
            near = did_you_mean(name, SAID) if not name.startswith(("_", "test")) else ""
            if near:
                raise InputError(f"{cls.__name__} says '{name}', which means nothing ({near}yours begin with _)")

    @classmethod
    def _class(cls) -> type[Any]:
        return plugins.registry().get_strategy(cls.use)


def _told(rules: Callable[[], tuple[Check, ...]]) -> tuple[Check, ...]:
    """The rules, or the end of the collection with the text of what is wrong with the class, and no frames."""
    try:
        return rules()
    except PrunekitError as error:
        said = str(error)
    import pytest

    raise pytest.fail.Exception(said, pytrace=False)


def contract(
    use: str,
    options: Mapping[str, Any] | None = None,
    *,
    keep: Mapping[str, Any] | None = None,
    at_most: bool = False,
    may_keep_more: bool = False,
    without: Mapping[str, str] | None = None,
) -> type[StrategyContract]:
    """`StrategyContract` for the strategy registered as `use`, as a class; bind it to a name that begins with `Test`.

    Arguments as there. Raises UnknownName when nothing registered the name.
    """
    plugins.registry().strategy_entry(use)
    members: dict[str, Any] = {
        "use": use, "options": dict(options or {}), "keep": keep, "at_most": at_most, "may_keep_more": may_keep_more,
        "without": dict(without or {}), "__doc__": f"The contract of '{use}'.",
    }  # fmt: skip
    return type(f"Test_{use}", (StrategyContract,), members)
