"""What follows from the declaration and the hooks of a strategy, in the words that lists and cards use.

Nothing here is said by a strategy a second time: what it asks for, where it may act and which hooks it has tell whether
it reads the question, needs attention, is trained, or leaves a number of tokens that is known beforehand.
"""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

from prunekit.strategy import declare
from prunekit.strategy import inputs as table
from prunekit.strategy.declare import Declaration, implements
from prunekit.strategy.sites import ENCODER, Site, Sites

Kind = Literal["token", "image", "layer", "router"]
Count = Literal["fixed", "given", "own", ""]
# Headings in the order of the data; a strategy may declare one of its own, which comes behind.
GROUPS = (
    "baselines", "pixels", "in the tower", "before the decoder", "in the decoder", "video", "layers", "routers",
)  # fmt: skip
REGIONS: Mapping[str, str] = {
    "pixels": "at pixels", "tower": "in the vision tower", "encoder": "at the decoder input",
    "decoder": "in the decoder", "end": "at the end of the prefill",
}  # fmt: skip
COUNTS: Mapping[str, str] = {
    "fixed": "fixed", "given": "fixed where the file gives a budget, else its own", "own": "its own",
    "": "all tokens stay",
}  # fmt: skip
BEFORE_DECODER = ("pixels", "tower", "encoder")
# Inputs that tell what the text says, or may: whatever is over text tokens and does more than mark them.
_OVER_TEXT = (one.name for one in table.INPUTS if "T" in one.axes.split() and one.kind != "bool")
WORDS = (*_OVER_TEXT, "question", "embeds", "forward")
# Where a default that scales is shown: the decoder and the tower of a LLaVA-1.5-7B.
LAYERS, BLOCKS = 32, 23


@dataclass(frozen=True)
class About:
    """What a strategy is, as its options are by default.

    kind: what it decides about. group: its heading. paper, code: as declared; empty where it says none.
    sites: the parts of the way of the data where it may act, of `pixels`, `tower`, `encoder`, `decoder` and `end`;
        empty for what decides about layers alone. default: the sites that it takes by itself, as written, of a decoder
        of 32 layers.
    asks: the inputs that its hooks name. needs: what of model, processor and files they presuppose, in words.
    text_aware: it may see what the prompt says. attention: whose it reads, of `tower` and `decoder`.
    training_free: it has nothing that is trained. calibrated: it can be fitted to a model by `prunekit calibrate`.
    count: how many tokens it leaves: `fixed`, known from their number; `given`, fixed with a budget in the file, else
        its own; `own`, by what they show; empty for what decides about layers alone.
    servable: an engine that takes image embeddings could do it: before the decoder, with a count that can be fixed, and
        without the text.
    """

    kind: Kind
    group: str
    paper: str
    code: str
    sites: tuple[str, ...]
    default: tuple[str, ...]
    asks: tuple[str, ...]
    needs: tuple[str, ...]
    text_aware: bool
    attention: tuple[str, ...]
    training_free: bool
    calibrated: bool
    count: Count
    servable: bool

    @property
    def link(self) -> str:
        """The address of its paper; empty where it names none."""
        return self.paper if not self.paper or ":" in self.paper else f"https://arxiv.org/abs/{self.paper}"

    @property
    def placed(self) -> str:
        """Its default sites in one phrase; empty where options or a calibration say them."""
        if not self.default:
            return ""
        listed = ", ".join(self.default)
        if len(self.default) > 4:
            listed = f"{self.default[0]} to {self.default[-1]}, {len(self.default)} sites"
        return listed + f" of {LAYERS} layers" * self.default[0][0].isdigit()

    def to_json(self) -> dict[str, Any]:
        """Plain data for `json.dump`."""
        return asdict(self)


def about(cls: type[Any]) -> About:
    """What follows from a declared strategy class. Where its options have no default, what does not depend on them."""
    declaration: Declaration = cls.__prunekit__
    instance = _instance(cls)
    kind, asks = _kind(cls), tuple(dict.fromkeys(_asks(cls)))
    requests = _tried(lambda: declaration.inputs_of(instance), {})
    sites = _regions(cls, declaration, instance)
    rows = table.requests(requests, "attention") if "attention" in asks else ()
    text_aware = any(name in WORDS for name in asks) or any(one.queries != "visual" for one in rows)
    count = _count(cls, declaration)
    before = any(site in BEFORE_DECODER for site in sites)
    default = _default(cls, declaration, instance)
    return About(
        kind,
        declaration.group or _group(kind, default, sites),
        declaration.paper,
        declaration.code,
        sites,
        tuple(map(str, default)),
        asks,
        tuple(_needs(cls, asks, requests)),
        text_aware,
        tuple(whose for whose, name in (("tower", "encoder_attention"), ("decoder", "attention")) if name in asks),
        not (implements(cls, "learner") or declaration.trainable),
        implements(cls, "calibrate"),
        count,
        kind in ("token", "image") and before and count in ("fixed", "given") and not text_aware,
    )


def _kind(cls: type[Any]) -> Kind:
    if declare.is_router(cls):
        return "router"
    if declare.is_image(cls):
        return "image"
    return "token" if declare.is_token(cls) else "layer"


def _instance(cls: type[Any]) -> Any:
    """With default options; of a class that needs some, an instance that has the defaults of the others only."""
    return _tried(cls, object.__new__(cls))


def _tried(make: Any, otherwise: Any) -> Any:
    """What a strategy's own function gives; `otherwise` where that depends on an option without a default."""
    try:
        return make()
    except Exception:
        return otherwise


def _asks(cls: type[Any]) -> Iterator[str]:
    """What its hooks name, in the order of the table of inputs."""
    named: set[str] = set()
    for hook in (*table.TOKEN_HOOKS, table.IMAGE_HOOK, "route"):
        if implements(cls, hook):
            named.update(inspect.signature(getattr(cls, hook)).parameters)
    return (one.name for one in table.INPUTS if one.name in named)


def _regions(cls: type[Any], declaration: Declaration, instance: Any) -> tuple[str, ...]:
    if not (declare.is_token(cls) or declare.is_image(cls) or declare.routes_tokens(cls)):
        return ()
    sites = _tried(lambda: declaration.sites_of(instance), Sites())
    allowed = {
        "pixels": sites.pixels, "tower": sites.tower, "encoder": sites.encoder, "decoder": sites.decoder,
        "end": sites.end,
    }  # fmt: skip
    return tuple(name for name, here in allowed.items() if here)


def _default(cls: type[Any], declaration: Declaration, instance: Any) -> tuple[Site, ...]:
    if not (declare.is_token(cls) or declare.is_image(cls) or declare.routes_tokens(cls)):
        return ()
    schedule = _tried(lambda: declaration.schedule_of(instance, LAYERS, BLOCKS), None)
    if schedule:
        return tuple(site for site, _ in schedule)
    sites = _tried(lambda: declaration.sites_of(instance), Sites())
    site = _tried(lambda: sites.resolve(LAYERS), ENCODER)
    return (site,) if sites.reason_against(site) is None else ()  # else options or a calibration say where


def _group(kind: Kind, default: tuple[Site, ...], sites: tuple[str, ...]) -> str:
    if kind in ("layer", "router"):
        return f"{kind}s"
    where = table.region_of(default[0]) if default else sites[0]
    return {"pixels": "pixels", "tower": "in the tower", "encoder": "before the decoder"}.get(where, "in the decoder")


def _count(cls: type[Any], declaration: Declaration) -> Count:
    if not (declare.is_token(cls) or declare.is_image(cls) or declare.routes_tokens(cls)):
        return ""
    if declare.is_router(cls) or (declaration.keep == "required" and not declare.is_image(cls)):
        return "fixed"  # without a budget of tokens a router lets all of them stay
    schedule = _tried(lambda: declaration.schedule_of(_instance(cls), LAYERS, BLOCKS), None) or ()
    scheduled = bool(schedule) and all(keep is not None for _, keep in schedule)
    if declaration.drops_all or declaration.fixed_count or (scheduled and declaration.fixed_count is None):
        return "fixed"
    return "given" if declaration.keep == "optional" else "own"


def _needs(cls: type[Any], asks: tuple[str, ...], requests: Mapping[str, Any]) -> Iterator[str]:
    """What models, callers and files have to have."""
    tower = [one for name in table.OF_TOWER if name in asks for one in table.requests(requests, name)]
    of_cls = any(getattr(one, "query", "") == "cls" or getattr(one, "of", "") == "cls" for one in tower)
    if of_cls or cls.__prunekit__.extras:
        yield "a CLS token in the vision tower"
    elif tower:
        yield "a vision tower that can be read"
    if any(getattr(one, "query", "") == "pool" for one in tower):
        yield "a pooling head behind the vision tower"
    if "patches" in asks:
        yield "a vision tower that takes images of any size"
    if "project" in asks:
        yield "a projector that maps single tokens"
    if "question" in asks:
        yield "a processor, for the user's words"
    if any(name in asks for name in (*table.OF_DECODER_LAYERS, "previous_hidden")):
        yield "decoder layers that can be cut and read"
    if implements(cls, "learner"):
        yield "a trained router"
    for one in dataclasses.fields(cls):
        if one.default is dataclasses.MISSING and "Path" in str(one.type):
            yield f"files, which `{one.name}` names"
    if implements(cls, "calibrate"):
        yield "a calibration (`prunekit calibrate`), unless options say enough"
