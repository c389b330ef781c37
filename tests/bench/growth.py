"""The cost of a growing configuration: the gateway compared with itself, in alternating rounds."""

from __future__ import annotations

import contextlib
import functools
import time
from collections.abc import Callable, Sequence

from tests.bench import limits, traffic
from tests.bench.load import Traffic
from tests.bench.measure import rounds, say
from tests.bench.peers import PIPELINE, REPAIRS, Peer, Setup
from tests.bench.place import Place
from tests.bench.rows import Row

TEAMS, KEYS, MODELS, NO_OPS = 500, 5, 200, 20
FEW, MANY = 100, 5000
REGIONS = 3
EVENTS_PER_SECOND = 2500
SHORT = 8

NO_OP = """\
from gateway import Stage


class BenchNoOp(Stage):
    async def __call__(self, request, call_next):
        return await call_next(request)
"""


def teams(place: Place) -> list[Row]:
    """Measure requests with one team's keys, alone and among many teams, and with the keys of all teams."""
    one, spread = (
        [traffic.team_key(team, key) for key in range(KEYS) for team in range(count)] for count in (1, TEAMS)
    )
    few, many = place.ours(Setup(teams=1, keys=KEYS)), place.ours(Setup(teams=TEAMS, keys=KEYS))
    load = _requests(place, "one-team", [_request(key=key) for key in one], True)
    figures = _compare(place, f"{TEAMS} teams", {
        "few": (few, load),
        "many": (many, load),
        "spread": (many, _requests(place, "teams", [_request(key=key) for key in spread], True)),
    })  # fmt: skip
    title = f"a request, {TEAMS} teams of {KEYS} keys instead of 1"
    return [
        Row(title, "% more CPU", limits.TEAMS, _more(figures)),
        Row(f"{title}, each connection another's", "% more CPU", limits.TEAMS,
            _more({"few": figures["few"], "many": figures["spread"]})),
    ]  # fmt: skip


def models(place: Place) -> list[Row]:
    """Measure requests for one model and for each of many."""
    few, many = (
        (place.ours(_with_models(names)), _requests(place, "models", [_request(model=name) for name in names]))
        for count in (1, MODELS)
        for names in [[f"model-{number:04}" for number in range(count)]]
    )
    figures = _compare(place, f"{MODELS} models", {"few": few, "many": many})
    return [Row(f"a request, {MODELS} models instead of 1", "% more CPU", limits.MODELS, _more(figures))]


def stages(place: Place) -> list[Row]:
    """Measure the pipeline alone, with the same number of no-op stages added, and with many of them."""
    load = _requests(place, "stages", [_request()])
    figures = _compare(
        place,
        "stages",
        {
            "few": (place.ours(), load),
            "many": (place.ours(_with_no_ops(len(PIPELINE))), load),
            "crowd": (place.ours(_with_no_ops(NO_OPS)), load),
        },
    )
    each = [(crowd - few) / NO_OPS for few, crowd in zip(figures["few"], figures["crowd"], strict=True)]
    return [
        Row("a stage that does nothing", "us of CPU", limits.STAGE, each),
        Row(f"a request, {2 * len(PIPELINE)} stages instead of {len(PIPELINE)}", "% more CPU", limits.STAGES,
            _more(figures)),
    ]  # fmt: skip


def balance(place: Place) -> list[Row]:
    """Measure requests to a pool of deployments in several resources, and to one deployment."""
    load = _requests(place, "balance", [_request()])
    pooled = [stage.replace(f": {traffic.DEPLOYMENT}}}", ': "pool:all"}') for stage in PIPELINE]
    pooled.insert(next(place for place, stage in enumerate(pooled) if stage.startswith("api_version")), "balance")
    pair = {
        "few": (place.ours(Setup(resources=REGIONS)), load),
        "many": (place.ours(Setup(pooled, resources=REGIONS, pool=True)), load),
    }
    figures = _compare(place, "balance", pair)
    place.azure.plain()
    calm = Traffic(load.requests, load.answer, connections=4)
    waits: dict[str, Callable[[], float]] = {
        name: functools.partial(
            lambda peer: place.meter.sample(peer, calm, place.seconds / SHORT).report.whole_p50, peer
        )
        for name, (peer, _) in pair.items()
    }
    times = rounds(SHORT * place.rounds, waits)
    more = [many - few for few, many in zip(times["few"], times["many"], strict=True)]
    title = f"a request, to a pool of {REGIONS} instead of one deployment"
    return [
        Row(title, "% more CPU", limits.BALANCE, _more(figures)),
        Row(f"{title}, p50 of 4 connections", "ms more", limits.BALANCE_P50, more),
    ]


def repairs(place: Place) -> list[Row]:
    """Measure events of paced streams, with and without the stages that repair Azure's streams."""
    without = Setup([stage for stage in PIPELINE if stage not in REPAIRS])
    figures = _beside(place, "repairs", {"few": without, "many": Setup()})
    return [Row("an event, with the default repairs instead of without", "% more CPU", limits.REPAIRS, _more(figures))]


def usage(place: Place) -> list[Row]:
    """Measure events of paced streams, with and without requesting and hiding their usage."""
    without = Setup(["access_log: {usage: false}" if stage == "access_log" else stage for stage in PIPELINE])
    figures = _beside(place, "usage", {"few": without, "many": Setup()})
    return [
        Row("an event, with the usage of its stream instead of without", "% more CPU", limits.USAGE, _more(figures))
    ]


def _beside(place: Place, what: str, setups: dict[str, Setup]) -> dict[str, list[float]]:
    """Return the microseconds of an event, round by round.

    Both gateways run at once on one core, so that other load on the machine affects both, and a few percent show.
    """
    file = place.workplace.write(f"{what}.request", _request(stream=True))
    load = Traffic(file, place.azure.event, events=10_000_000, connections=FEW, opening=64)
    place.azure.stream(load.events, 1000 * FEW // EVENTS_PER_SECOND)
    peers = {name: place.ours(setup) for name, setup in setups.items()}
    figures: dict[str, list[float]] = {"few": [], "many": []}
    with contextlib.ExitStack() as stack:
        held = {name: stack.enter_context(place.meter.held(peer, load)) for name, peer in peers.items()}
        time.sleep(1)
        for _ in range(2 * place.rounds):
            before = {name: (held[name].ask().bytes, peers[name].process.cpu()) for name in peers}
            time.sleep(place.seconds)
            for name, peer in peers.items():
                events = (held[name].ask().bytes - before[name][0]) / load.answer.stat().st_size
                figures[name].append((peer.process.cpu() - before[name][1]) / events * 1e6)
            say(f"{what}: without {figures['few'][-1]:.1f} us, with {figures['many'][-1]:.1f} us for an event")
    return figures


def streams(place: Place) -> list[Row]:
    """Measure events of few open streams, and the same number of events of many."""
    file = place.workplace.write("streams.request", _request(stream=True))

    def measure(peer: Peer, count: int) -> float:
        # They last longer than the measurement.
        load = Traffic(file, place.azure.event, events=10_000_000, connections=count, opening=64)
        place.azure.stream(load.events, 1000 * count // EVENTS_PER_SECOND)
        cpu = place.meter.hold(peer, load, place.seconds)
        say(f"{count} streams: {cpu:.1f} us for an event")
        return cpu

    pair = {"few": (place.ours(), FEW), "many": (place.ours(), MANY)}
    figures = rounds(
        place.rounds, {name: functools.partial(measure, peer, count) for name, (peer, count) in pair.items()}
    )
    title = f"an event, {MANY:,} open streams instead of {FEW}"
    return [Row(title, "% more CPU", limits.STREAMS, _more(figures))]


def _request(model: str = traffic.MODEL, *, key: str = traffic.KEY, stream: bool = False) -> bytes:
    return traffic.request(traffic.body(1024, model=model, stream=stream), key=key)


def _requests(place: Place, name: str, requests: Sequence[bytes], faithful: bool = False) -> Traffic:
    file = place.workplace.write(f"{name}-{len(requests)}.request", b"".join(requests))
    return Traffic(file, place.azure.answer, kinds=len(requests), faithful=faithful)


def _with_models(names: Sequence[str]) -> Setup:
    mapped = ", ".join(f"{name}: {traffic.DEPLOYMENT}" for name in names)
    return Setup([f"model_map: {{models: {{{mapped}}}}}" if "model_map" in stage else stage for stage in PIPELINE])


def _with_no_ops(count: int) -> Setup:
    no_ops = [f"bench_no_op as no_op_{number}" for number in range(count)]
    return Setup([*PIPELINE, *no_ops], stages={"bench_no_op": NO_OP})


def _compare(place: Place, what: str, gateways: dict[str, tuple[Peer, Traffic]]) -> dict[str, list[float]]:
    """Return the microseconds of a request in each gateway, round by round."""
    place.azure.plain()
    for peer, load in gateways.values():
        place.meter.warm(peer, load)

    def measure(name: str, peer: Peer, load: Traffic) -> float:
        cpu = place.meter.sample(peer, load, place.seconds / SHORT).cpu
        say(f"{what}: {name}: {cpu:.1f} us")
        return cpu

    measurements: dict[str, Callable[[], float]] = {
        name: functools.partial(measure, name, peer, load) for name, (peer, load) in gateways.items()
    }
    # Many short rounds, so that other load on the machine affects both, and a few percent show.
    return rounds(SHORT * place.rounds, measurements)


def _more(figures: dict[str, list[float]]) -> list[float]:
    """Return by how many percent `many` cost more than `few`, for rounds next to each other."""
    return [100 * (many / few - 1) for few, many in zip(figures["few"], figures["many"], strict=True)]
