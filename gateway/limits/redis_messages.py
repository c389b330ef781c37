"""Encodes the orders to the script in Redis and decodes its replies: bytes. See `redis.lua`."""

from __future__ import annotations

from collections.abc import Sequence
from struct import Struct

from gateway.limits.token_bucket import Charge, Decision, Record

__all__ = ("counter_key", "decode_replies", "encode_settle", "encode_take")

_PERIODS = {"minute": 0, "day": 1, "month": 2, "at_once": 3}
_CHARGE = Struct("<BBdddd")
_SETTLEMENT = Struct("<cBdddddd")
_TIME = Struct("<?d")
_RECORD = Struct("<?dddd")


def counter_key(prefix: str, charge: Charge) -> bytes:
    """Return the Redis key of a charge's counter. Concurrent use (`held`) has another data type than `used`."""
    kind = "held" if charge.limit.period == "at_once" else "used"
    return f"{prefix}{kind}:{charge.name}".encode("utf-8", "surrogatepass")


def encode_take(charges: Sequence[Charge]) -> bytes:
    """Return the order to take charges together."""
    parts = [b"T"]
    for charge in charges:
        limit = charge.limit
        parts.append(
            _CHARGE.pack(
                _PERIODS[limit.period],
                charge.shadow,
                limit.max_level,
                limit.refill_interval,
                limit.refill_amount,
                charge.cost,
            )
        )
    return b"".join(parts)


def encode_settle(charge: Charge, reserved: Record, actual: float) -> bytes:
    """Return the order to replace a charge's cost with its actual use; `reserved` is the record after the take."""
    limit = charge.limit
    return _SETTLEMENT.pack(
        b"S",
        _PERIODS[limit.period],
        limit.refill_interval,
        limit.refill_amount,
        charge.cost,
        actual,
        reserved[2],
        reserved[3],
    )


def decode_replies(reply: bytes, takes: Sequence[Sequence[Charge]]) -> list[Decision | None]:
    """Return the decision on each take, or None if one of its keys in Redis holds something else.

    Raises ValueError if the reply does not match the takes.
    """
    expected = _TIME.size + sum(1 + _RECORD.size * len(charges) for charges in takes)
    if len(reply) != expected:
        raise ValueError("the reply has the wrong length")
    _, now = _TIME.unpack_from(reply)
    at = _TIME.size
    decisions: list[Decision | None] = []
    for charges in takes:
        status = reply[at : at + 1]
        end = at + 1 + _RECORD.size * len(charges)
        if status == b"E":
            decisions.append(None)
        else:
            records: list[Record] = []
            over: list[int] = []
            for index, (full, *record) in enumerate(_RECORD.iter_unpack(reply[at + 1 : end])):
                records.append((record[0], record[1], record[2], record[3]))
                if full:
                    over.append(index)
            decisions.append(Decision(charges, records, now, over, status == b"R"))
        at = end
    return decisions
