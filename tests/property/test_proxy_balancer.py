"""The balancer: whom it picks, whom it leaves out and when it lets them back."""

from __future__ import annotations

import random
from collections import Counter

from hypothesis import given
from hypothesis import strategies as st

from proxy.balancer import POLICIES, RANDOM, ROUND_ROBIN, SILENCES_TO_EJECT, Balancer, BalancerOptions, RetryBudget
from raftstate.model.sidecar import Endpoint


def endpoints(count: int, **fields: object) -> list[Endpoint]:
    return [Endpoint(f"n{i}", "127.0.0.1", 20000 + i, "s", f"s-{i}", **fields) for i in range(count)]  # type: ignore[arg-type]


def balancer(*instances: Endpoint, seed: int = 1, **options: object) -> Balancer:
    made = Balancer(random.Random(seed).random, BalancerOptions(**options))  # type: ignore[arg-type]
    made.update(instances)
    return made


def picks(made: Balancer, count: int, now: float = 0.0) -> Counter[str]:
    chosen = [made.pick(now) for _ in range(count)]
    return Counter(each.key.instance for each in chosen if each is not None)


@given(
    st.sampled_from(POLICIES),
    st.lists(st.tuples(st.booleans(), st.integers(0, 4), st.booleans()), max_size=6),
    st.sets(st.integers(0, 5)),
)
def test_pick_is_usable_or_there_is_none(policy: str, specs: list[tuple[bool, int, bool]], tried: set[int]) -> None:
    given_ = [
        Endpoint("n", "127.0.0.1", 20000 + i, "s", f"s-{i}", healthy=healthy, weight=weight)
        for i, (healthy, weight, _) in enumerate(specs)
    ]
    made = balancer(*given_, policy=policy)
    by_name = {instance.key.instance: instance for instance in made.instances.values()}
    for i, (_, _, failed) in enumerate(specs):
        if failed:
            made.failed(by_name[f"s-{i}"], 0.0)
    exclude = {by_name[f"s-{i}"].key for i in tried if i < len(specs)}
    sound = [i for i in by_name.values() if i.endpoint.healthy and i.endpoint.weight > 0]
    candidates = [i for i in (sound or by_name.values()) if i.key not in exclude]
    chosen = made.pick(0.5, exclude)
    assert (chosen is None) == (not candidates)
    if chosen is not None:
        assert chosen in candidates
        if any(i.ejected_until <= 0.5 for i in candidates):
            assert chosen.ejected_until <= 0.5


def test_least_request_sends_to_the_idle_one() -> None:
    made = balancer(*endpoints(2))
    busy, idle = made.instances.values()
    busy.active = 5
    assert picks(made, 50) == {idle.key.instance: 50}


def test_weights_are_kept() -> None:
    one, three = Endpoint("n", "h", 1, "s", "one", weight=1), Endpoint("n", "h", 2, "s", "three", weight=3)
    assert picks(balancer(one, three, policy=ROUND_ROBIN), 400) == {"one": 100, "three": 300}
    share = picks(balancer(one, three, policy=RANDOM), 4000)["three"] / 4000
    assert 0.7 < share < 0.8


def test_unhealthy_are_used_only_when_none_is_healthy() -> None:
    sick, well = Endpoint("n", "h", 1, "s", "sick", healthy=False), Endpoint("n", "h", 2, "s", "well")
    assert picks(balancer(sick, well), 20) == {"well": 20}
    assert picks(balancer(sick), 3) == {"sick": 3}


def test_panic_threshold_ignores_health() -> None:
    sick = [Endpoint("n", "h", i, "s", f"sick-{i}", healthy=False) for i in range(3)]
    well = Endpoint("n", "h", 9, "s", "well")
    assert len(picks(balancer(*sick, well, panic_threshold=0.5), 200)) == 4


def test_ejection_backs_off_and_ends_with_success() -> None:
    made = balancer(*endpoints(2))
    bad, good = made.instances.values()
    assert made.failed(bad, 0.0)
    assert picks(made, 10, now=0.9) == {good.key.instance: 10}
    assert bad.key.instance in picks(made, 50, now=1.1)
    assert made.failed(bad, 1.1)
    assert picks(made, 10, now=3.0) == {good.key.instance: 10}
    assert bad.key.instance in picks(made, 50, now=3.2)
    made.succeeded(bad)
    assert made.failed(bad, 4.0)
    assert bad.ejected_until == 5.0


def test_all_ejected_still_gives_the_one_whose_time_is_up_first() -> None:
    made = balancer(*endpoints(2))
    first, second = made.instances.values()
    made.failed(second, 0.0)
    made.failed(first, 0.5)
    assert made.pick(0.6) is second
    assert made.pick(0.6, {second.key}) is first


def test_requests_that_are_not_answered_eject_only_when_none_is_for_a_while() -> None:
    made = balancer(*endpoints(2))
    one, other = made.instances.values()
    for _ in range(3):
        assert not any(made.silent(one, 0.0) for _ in range(SILENCES_TO_EJECT - 1))
        made.answered(one, 500, 0.0)  # it speaks
    assert [made.silent(one, 0.0) for _ in range(SILENCES_TO_EJECT)][-1]
    assert set(picks(made, 50, now=0.5)) == {other.key.instance}
    assert len(picks(made, 50, now=1.5)) == 2
    judged = balancer(*endpoints(2), judges_answers=True, failures_to_eject=2)
    bad = next(iter(judged.instances.values()))
    assert [judged.silent(bad, 0.0), judged.answered(bad, 500, 0.0)] == [False, True], "as an answer of 504"


def test_where_all_are_ejected_for_their_answers_none_gets_the_load_of_all() -> None:
    made = balancer(*endpoints(4), judges_answers=True, base_ejection_s=30.0)
    for number, instance in enumerate(made.instances.values()):
        assert made.answered(instance, 500, number)
    assert min(picks(made, 400, now=5.0).values()) > 50, "they take connections, and may answer again"
    refusing = next(iter(made.instances.values()))
    made.refused(refusing, 5.0)
    assert refusing.key.instance not in picks(made, 100, now=5.5)


def test_panic_ignores_ejections_too_but_not_who_refuses_us() -> None:
    made = balancer(*endpoints(4), panic_threshold=0.5, base_ejection_s=30.0)
    first, second, third, fourth = made.instances.values()
    made.failed(first, 0.0)
    assert set(picks(made, 100, now=1.0)) == {one.key.instance for one in (second, third, fourth)}
    made.failed(second, 0.0)
    spread = picks(made, 400, now=1.0)
    assert len(spread) == 4, "half are out, so ejections are not believed"
    assert min(spread.values()) > 50
    assert made.pick(1.0, {first.key, third.key, fourth.key}) is second
    made.refused(third, 1.0)
    assert third.key.instance not in picks(made, 100, now=1.5)


def test_what_was_under_way_when_an_instance_was_ejected_does_not_eject_it_again() -> None:
    made = balancer(*endpoints(2), judges_answers=True, failures_to_eject=3, base_ejection_s=10.0)
    bad = next(iter(made.instances.values()))
    assert [made.answered(bad, 500, 0.0) for _ in range(12)] == [False, False, True] + [False] * 9
    assert [made.answered(bad, 500, 20.0) for _ in range(3)] == [False, False, True]


def test_refused_is_avoided_for_a_moment() -> None:
    made = balancer(*endpoints(2))
    denied, other = made.instances.values()
    made.refused(denied, 0.0)
    assert picks(made, 10, now=0.5) == {other.key.instance: 10}
    assert len(picks(made, 50, now=1.5)) == 2


def test_update_keeps_what_is_known_and_reports_who_went() -> None:
    made = balancer(*endpoints(3))
    kept = next(iter(made.instances.values()))
    kept.active = 7
    gone = made.update(endpoints(1))
    assert {instance.key.instance for instance in gone} == {"s-1", "s-2"}
    assert next(iter(made.instances.values())) is kept


def test_locality_is_a_preference() -> None:
    near, far = Endpoint("here", "h", 1, "s", "near", zone="a"), Endpoint("there", "h", 2, "s", "far", zone="b")
    made = balancer(near, far, prefer_node="here", prefer_zone="a")
    assert picks(made, 20) == {"near": 20}
    made.failed(made.instances[next(k for k in made.instances if k.instance == "near")], 0.0)
    assert picks(made, 20, now=0.5) == {"far": 20}


def test_retry_budget_bounds_retries() -> None:
    budget = RetryBudget(share=0.2, floor_per_s=0.0, most=10.0)
    assert sum(budget.take(1.0) for _ in range(100)) == 10
    for _ in range(50):
        budget.connection()
    assert sum(budget.take(1.0) for _ in range(100)) in (9, 10)


def test_answers_of_500_and_above_in_a_row_leave_an_instance_out() -> None:
    made = balancer(
        *endpoints(4), judges_answers=True, failures_to_eject=3, base_ejection_s=10.0, max_ejection_s=300.0
    )
    bad = next(iter(made.instances.values()))
    for status in (500, 503, 200, 500, 503):
        assert not made.answered(bad, status, 0.0)
        made.succeeded(bad)  # it goes on taking connections, which says nothing of its answers
    assert made.answered(bad, 502, 0.0)
    assert bad.key.instance not in picks(made, 200, now=9.9)
    assert bad.key.instance in picks(made, 200, now=10.0)
    for _ in range(2):
        made.answered(bad, 500, 10.0)
    assert made.answered(bad, 500, 10.0)
    assert bad.ejected_until == 30.0, "twice as long the second time"
    for _ in range(3):
        made.answered(bad, 500, 400.0)
    assert bad.ejected_until == 410.0, "it was well for so long that it begins anew"
    plain = balancer(*endpoints(2))
    assert not any(plain.answered(one, 500, 0.0) for one in plain.instances.values() for _ in range(100))


@given(st.integers(1, 12), st.integers(0, 100))
def test_no_more_than_a_share_of_the_instances_is_left_out_but_one_always_may_be(count: int, percent: int) -> None:
    made = balancer(*endpoints(count), judges_answers=True, base_ejection_s=10.0, ejected_share_max=percent / 100)
    ejected = sum(made.answered(instance, 500, 0.0) for instance in made.instances.values())
    assert ejected >= 1
    assert ejected <= max(1, percent / 100 * count + 1)
    if percent == 100:
        assert ejected == count


def test_ejections_are_enforced_for_a_share_and_end_at_intervals() -> None:
    made = balancer(*endpoints(1000), judges_answers=True, enforced_share=0.3)
    enforced = sum(made.answered(instance, 500, 0.0) for instance in made.instances.values())
    assert 230 < enforced < 370
    made = balancer(*endpoints(2), judges_answers=True, base_ejection_s=7.0, interval_s=10.0)
    one = next(iter(made.instances.values()))
    made.answered(one, 500, 1.0)
    assert one.ejected_until == 10.0
