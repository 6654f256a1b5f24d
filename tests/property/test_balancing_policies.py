"""Hashing policies move few keys, weights and localities are kept to, newcomers are warmed up."""

from __future__ import annotations

import random
from collections import Counter

import msgspec
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from proxy.balancer import LEAST_REQUEST, MAGLEV, RANDOM, RING_HASH, ROUND_ROBIN, Balancer, BalancerOptions
from proxy.balancing.hashing import RING_POINTS_MAX, Ring, hash_of
from raftstate.model.sidecar import Endpoint

KEYS = [hash_of(f"user-{number}".encode()) for number in range(3000)]


def endpoints(count: int, **fields: object) -> list[Endpoint]:
    return [Endpoint(f"n{i}", "127.0.0.1", 20000 + i, "s", f"s-{i}", **fields) for i in range(count)]  # type: ignore[arg-type]


def balancer(given_: list[Endpoint], **options: object) -> Balancer:
    made = Balancer(random.Random(7).random, BalancerOptions(**options))  # type: ignore[arg-type]
    made.update(given_)
    return made


def places(made: Balancer, now: float = 0.0) -> dict[int, str]:
    found = {}
    for key in KEYS:
        instance = made.pick(now, hashed=key)
        assert instance is not None
        found[key] = instance.key.instance
    return found


@pytest.mark.parametrize(("policy", "moved_max"), [(RING_HASH, 0.0), (MAGLEV, 0.03)])
@settings(max_examples=15, deadline=None)
@given(count=st.integers(2, 66), gone=st.integers(0, 65))
@example(count=4, gone=3)
@example(count=8, gone=7)
@example(count=16, gone=0)
@example(count=41, gone=40)
@example(count=64, gone=1)
def test_a_key_moves_only_when_its_instance_goes(policy: str, moved_max: float, count: int, gone: int) -> None:
    everyone = endpoints(count)
    made = balancer(everyone, policy=policy)
    before = places(made)
    lost = everyone[gone % count]
    made.update([each for each in everyone if each is not lost])
    after = places(made)
    moved = sum(1 for key in KEYS if before[key] != lost.service_id and before[key] != after[key]) / len(KEYS)
    assert moved <= moved_max
    made.update(everyone)
    assert places(made) == before


@pytest.mark.parametrize(("policy", "count", "moved_max"), [(RING_HASH, 127, 0.0), (MAGLEV, 163, 0.03)])
def test_a_newcomer_among_many_takes_its_share_and_moves_next_to_nothing_else(
    policy: str, count: int, moved_max: float
) -> None:
    before, after = (places(balancer(endpoints(many), policy=policy)) for many in (count, count + 1))
    assert sum(before[key] != after[key] != f"s-{count}" for key in KEYS) / len(KEYS) <= moved_max


@pytest.mark.parametrize("asked", [(1, 1), (1024, 1024), (1024, 8_388_608), (8_388_608, 8_388_608)])
def test_a_ring_is_as_large_as_it_may_be_and_no_larger(asked: tuple[int, int]) -> None:
    for count in (1, 2, 100, 300):
        ring = Ring([(n, f"s-{n}", 1) for n in range(count)], *asked)
        size = len(ring._points)
        assert size <= max(count, min(asked[1], RING_POINTS_MAX))
        if count > 1:
            assert size >= min(asked[0], RING_POINTS_MAX // 2, asked[1] // 2)
        assert {ring.find(key, lambda _: True) for key in KEYS} <= set(range(count))


@pytest.mark.parametrize("policy", [RING_HASH, MAGLEV])
def test_an_ejected_instance_gives_up_its_keys_alone_and_gets_them_back(policy: str) -> None:
    made = balancer(endpoints(5), policy=policy)
    before = places(made)
    victim = next(iter(made.instances.values()))
    made.failed(victim, 0.0)
    during = places(made, now=0.5)
    assert victim.key.instance not in during.values()
    assert all(during[key] == before[key] for key in KEYS if before[key] != victim.key.instance)
    assert len({during[key] for key in KEYS if before[key] == victim.key.instance}) == 4
    assert places(made, now=10.0) == before


@pytest.mark.parametrize(("policy", "within"), [(RING_HASH, 0.45), (MAGLEV, 0.12)])
def test_keys_are_spread_by_weight(policy: str, within: float) -> None:
    weights = [1, 1, 2, 4]
    given_ = [msgspec.structs.replace(one, weight=w) for one, w in zip(endpoints(4), weights, strict=True)]
    counted = Counter(places(balancer(given_, policy=policy)).values())
    for one, weight in zip(given_, weights, strict=True):
        assert counted[one.service_id] / len(KEYS) == pytest.approx(weight / 8, rel=within)


@settings(max_examples=20, deadline=None)
@given(
    st.sampled_from([RANDOM, ROUND_ROBIN, LEAST_REQUEST]),
    st.lists(st.integers(1, 5), min_size=2, max_size=5),
    st.integers(2, 4),
)
def test_calls_are_spread_by_weight(policy: str, weights: list[int], choices: int) -> None:
    given_ = [msgspec.structs.replace(one, weight=w) for one, w in zip(endpoints(len(weights)), weights, strict=True)]
    made = balancer(given_, policy=policy, choice_count=choices)
    counted = Counter(made.pick(0.0) for _ in range(3000))
    for instance, count in counted.items():
        assert instance is not None
        assert count / 3000 == pytest.approx(instance.endpoint.weight / sum(weights), abs=0.05)


def test_least_request_fills_instances_by_weight() -> None:
    given_ = [msgspec.structs.replace(one, weight=w) for one, w in zip(endpoints(4), (5, 1, 1, 3), strict=True)]
    made = balancer(given_, policy=LEAST_REQUEST)
    for _ in range(400):
        picked = made.pick(0.0)
        assert picked is not None
        picked.active += 1
    assert [i.active for i in made.instances.values()] == pytest.approx([200, 40, 40, 120], abs=12)


@pytest.mark.parametrize("policy", [LEAST_REQUEST, RANDOM])
def test_an_idle_newcomer_gets_its_warm_share(policy: str) -> None:
    made = balancer(endpoints(2), policy=policy, slow_start_s=10.0)
    made.update(endpoints(3), now=100.0)
    newcomer = list(made.instances.values())[-1]
    assert sum(made.pick(105.0) is newcomer for _ in range(3000)) / 3000 == pytest.approx(0.5 / 2.5, abs=0.03)


def test_more_choices_find_the_idle_one_more_often() -> None:
    found = {}
    for choices in (2, 8):
        made = balancer(endpoints(20), policy=LEAST_REQUEST, choice_count=choices)
        idle, *busy = made.instances.values()
        for instance in busy:
            instance.active = 5
        found[choices] = sum(made.pick(0.0) is idle for _ in range(2000))
    assert found[2] / 2000 == pytest.approx(2 / 20, abs=0.03)
    assert found[8] / 2000 == pytest.approx(8 / 20, abs=0.05)


def test_near_instances_overflow_when_few_of_them_are_well() -> None:
    near = [Endpoint("n", "h", i, "s", f"near-{i}", zone="a") for i in range(4)]
    far = [Endpoint("f", "h", 10 + i, "s", f"far-{i}", zone="b") for i in range(4)]

    def share_of_far(sick: int) -> float:
        given_ = [msgspec.structs.replace(one, healthy=i >= sick) for i, one in enumerate(near)] + far
        made = balancer(given_, policy=RANDOM, prefer_zone="a")
        counted = Counter(made.pick(0.0) for _ in range(2000))
        return sum(n for one, n in counted.items() if one is not None and one.endpoint.zone == "b") / 2000

    assert share_of_far(0) == share_of_far(1) == 0
    # 1.4 * 1/4 of the calls stay near; the rest is spread over the five that are well, one of which is near.
    assert share_of_far(3) == pytest.approx((1 - 0.35) * 4 / 5, abs=0.05)
    assert share_of_far(4) == 1


def test_a_newcomer_is_warmed_up_and_the_first_ones_are_not() -> None:
    for policy in (RANDOM, ROUND_ROBIN):
        made = balancer(endpoints(2), policy=policy, slow_start_s=10.0)
        assert Counter(made.pick(1.0) for _ in range(1000)).most_common()[-1][1] > 400
        made.update(endpoints(3), now=100.0)
        newcomer = list(made.instances.values())[-1]

        def share(now: float, made: Balancer = made, who: object = newcomer) -> float:
            return sum(made.pick(now) is who for _ in range(3000)) / 3000

        assert share(100.0) == pytest.approx(0.1 / 2.1, abs=0.02)
        assert share(105.0) == pytest.approx(0.5 / 2.5, abs=0.03)
        assert share(110.0) == pytest.approx(1 / 3, abs=0.03)
