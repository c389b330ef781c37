"""What a gateway says to the script in Redis, and what it hears: bytes. See `redis.lua`."""

from __future__ import annotations

from collections.abc import Sequence
from struct import Struct

from gateway.limits.token_bucket import Charge, Decision, Record

__all__ = ("decode_replies", "encode_settle", "encode_take", "key")

_PERIODS = {"minute": 0, "day": 1, "month": 2, "at_once": 3}
_CHARGE = Struct("<BBdddd")
_SETTLING = Struct("<cBdddddd")
_TIME = Struct("<?d")
_RECORD = Struct("<?dddd")


def key(prefix: str, charge: Charge) -> bytes:
    """Return the key under which a charge is counted. What is held at once is kept otherwise than what was used."""
    kind = "held" if charge.rule.period == "at_once" else "used"
    return f"{prefix}{kind}:{charge.name}".encode("utf-8", "surrogatepass")


def encode_take(charges: Sequence[Charge]) -> bytes:
    """Return the order to take charges together."""
    parts = [b"T"]
    for charge in charges:
        rule = charge.rule
        parts.append(
            _CHARGE.pack(_PERIODS[rule.period], charge.shadow, rule.most, rule.step, rule.per_step, charge.cost)
        )
    return b"".join(parts)


def encode_settle(charge: Charge, held: Record, actual: float) -> bytes:
    """Return the order to let `actual` take the place of what was taken; `held` is how the record was behind it."""
    rule = charge.rule
    return _SETTLING.pack(b"S", _PERIODS[rule.period], rule.step, rule.per_step, charge.cost, actual, held[2], held[3])


def decode_replies(reply: bytes, takes: Sequence[Sequence[Charge]]) -> list[Decision | None]:
    """Return what became of the charges of each take: None where Redis holds something else under one of the names.

    Raises ValueError where the reply is not about them.
    """
    expected = _TIME.size + sum(1 + _RECORD.size * len(charges) for charges in takes)
    if len(reply) != expected:
        raise ValueError("the answer is of another length")
    _, now = _TIME.unpack_from(reply)
    at = _TIME.size
    verdicts: list[Decision | None] = []
    for charges in takes:
        status = reply[at : at + 1]
        end = at + 1 + _RECORD.size * len(charges)
        if status == b"E":
            verdicts.append(None)
        else:
            records: list[Record] = []
            over: list[int] = []
            for place, (full, *record) in enumerate(_RECORD.iter_unpack(reply[at + 1 : end])):
                records.append((record[0], record[1], record[2], record[3]))
                if full:
                    over.append(place)
            verdicts.append(Decision(charges, records, now, over, status == b"R"))
        at = end
    return verdicts
