"""What is sent when, in virtual time."""

from __future__ import annotations

import random

import pytest

from flows.wire import PushEntry
from gateway.handover import EntryName
from gateway.webhook_plan import IN_FLIGHT_MAX, PROBE_S_MAX, TRIES_MAX, WINDOW, DeliveryPlan, Entry, Fate, Pace
from gateway.webhook_sender import Answer, Outcome

OK = Answer(Outcome.ACCEPTED, 200, "answered 200")
BROKEN = Answer(Outcome.REFUSED, 500, "answered 500")
AWAY = Answer(Outcome.UNREACHABLE, None, "no connection")


def later(retry_after_s: float | None) -> Answer:
    return Answer(Outcome.LATER, 429, "answered 429", retry_after_s)


def entry(number: int, alert_id: str = "a", kind: str = "alert", revision: int = 1, shard: int = 0) -> Entry:
    push = PushEntry(alert_id, revision, kind, 100.0, 0, (f"{number}",))
    return Entry(f"push:{{s{shard}}}:amap", (number, 0), EntryName(shard, 0, (number, 0)), push)


def plan_of(*entries: Entry) -> DeliveryPlan:
    plan = DeliveryPlan(random=random.Random(1))
    plan.add(entries)
    return plan


def numbers(entries: list[Entry]) -> list[int]:
    return [one.pending_id[0] for one in entries]


def next_s(plan: DeliveryPlan, now_s: float) -> float:
    found = plan.next_s(now_s)
    assert found is not None
    return found


# --- order ------------------------------------------------------------------------------------------------------------


def test_entries_of_one_alert_and_kind_are_sent_together_and_what_follows_waits_for_all_of_them() -> None:
    first, second = entry(1), entry(2)
    plan = plan_of(first, second, entry(3, "b"), entry(4, kind="update", revision=2), entry(5, kind="resolved"))
    assert sorted(numbers(plan.to_send(0))) == [1, 2, 3]
    assert plan.answered(first, OK, 0) is Fate.DONE
    assert plan.to_send(0) == []
    assert plan.answered(second, OK, 0) is Fate.DONE
    (update,) = plan.to_send(0)
    assert update.push.kind == "update"
    plan.answered(update, OK, 0)
    assert numbers(plan.to_send(0)) == [5]


def test_an_entry_that_failed_holds_up_its_own_alert_in_its_own_shard_and_nothing_else() -> None:
    failing = entry(1)
    plan = plan_of(
        failing, entry(2, kind="resolved"), entry(3, "b"), entry(4, "b", "resolved"), entry(5, kind="resolved", shard=1)
    )
    sent = plan.to_send(0)
    assert sorted(numbers(sent)) == [1, 3, 5]
    plan.answered(failing, BROKEN, 0)
    for one in sent:
        if one is not failing:
            plan.answered(one, OK, 0)
    assert numbers(plan.to_send(0.1)) == [4]
    assert numbers(plan.to_send(next_s(plan, 0.1))) == [1]


def test_an_alert_of_a_later_revision_does_not_overtake_its_update() -> None:
    plan = plan_of(entry(1), entry(2, kind="update", revision=2), entry(3), entry(4, kind="alert", revision=2))
    assert numbers(plan.to_send(0)) == [1]


def test_entries_found_later_take_the_place_of_their_ids() -> None:
    plan = plan_of(entry(2, kind="update", revision=2))
    plan.add([entry(1)])
    assert numbers(plan.to_send(0)) == [1]


def test_shards_take_turns() -> None:
    entries = [entry(number, shard=shard) for shard in range(4) for number in range(1, WINDOW + 1)]
    plan = plan_of(*entries)
    sent = plan.to_send(0)
    assert len(sent) == IN_FLIGHT_MAX
    assert [sum(one.name.shard == shard for one in sent) for shard in range(4)] == [8, 8, 8, 8]
    assert plan.room(entries[0].stream) == 0
    served = []
    for one in sent[:4]:
        plan.answered(one, OK, 0)
        served += plan.to_send(0)
    assert sorted(one.name.shard for one in served) == [0, 1, 2, 3]


# --- failures ---------------------------------------------------------------------------------------------------------


def test_waits_double_between_half_and_all_up_to_a_limit() -> None:
    pace, chance = Pace(), random.Random(7)
    for failures, most in ((1, 1.0), (2, 2.0), (5, 16.0), (9, 120.0), (10_000, 120.0)):
        waits = [pace.after(failures, 120.0, chance) for _ in range(200)]
        assert most / 2 <= min(waits) < 0.6 * most
        assert 0.9 * most < max(waits) <= most


def test_entry_that_the_receiver_cannot_stomach_is_given_up_while_others_pass() -> None:
    poison, now_s = entry(0), 0.0
    plan = plan_of(poison)
    tries = 0
    for number in range(1, 100):
        plan.add([entry(number)])
        fates = {}
        for one in plan.to_send(now_s):
            tries += one is poison
            fates[one.pending_id[0]] = plan.answered(one, BROKEN if one is poison else OK, now_s)
        assert not plan.down
        if fates.get(0) is Fate.GIVEN_UP:
            break
        now_s += 5
    assert (tries, poison.reason) == (TRIES_MAX, "answered 500")
    assert len(plan) == 0


def test_lone_entry_that_the_receiver_cannot_stomach_is_given_up_for_test_events_are_accepted() -> None:
    poison, now_s, tries, tests = entry(1), 0.0, 0, 0
    plan = plan_of(poison)
    given_up = False
    while not given_up:
        for one in plan.to_send(now_s):
            tries += 1
            given_up = plan.answered(one, BROKEN, now_s) is Fate.GIVEN_UP
        if plan.to_probe(now_s):
            tests += 1
            given_up = plan.probed(OK, now_s) == [poison]
        if not given_up:
            now_s = next_s(plan, now_s)
    assert tries == TRIES_MAX
    assert 1 <= tests <= TRIES_MAX
    assert now_s < 300


@pytest.mark.parametrize("outage_s", [1.0, 60.0, 86_400.0])
def test_an_outage_however_long_costs_no_entry_its_place(outage_s: float) -> None:
    entries = [entry(number, shard=number % 2) for number in range(1, 11)]
    plan, now_s, requests = plan_of(*entries), 0.0, 0
    while now_s < outage_s:
        for one in plan.to_send(now_s):
            requests += 1
            assert plan.answered(one, AWAY, now_s) is Fate.AGAIN
        if plan.to_probe(now_s):
            requests += 1
            assert plan.probed(AWAY, now_s) == []
        now_s = next_s(plan, now_s)
    assert requests < 20 + outage_s / (PROBE_S_MAX / 2)
    assert all(one.tries <= 3 for one in entries)
    while plan.down:
        now_s = next_s(plan, now_s)
        assert plan.to_probe(now_s)
        assert plan.probed(OK, now_s) == []
    assert now_s <= outage_s + 2 * PROBE_S_MAX
    assert sorted(numbers(plan.to_send(now_s))) == list(range(1, 11))


def test_failures_of_an_outage_are_forgiven() -> None:
    lone = entry(1)
    plan, now_s = plan_of(lone), 0.0
    for _ in range(5):  # outages
        while not plan.down:
            for one in plan.to_send(now_s):
                plan.answered(one, AWAY, now_s)
            if not plan.down:
                now_s = next_s(plan, now_s)
        now_s = next_s(plan, now_s)
        assert plan.to_probe(now_s)
        plan.probed(AWAY, now_s)
        assert lone.tries == 0
        now_s = next_s(plan, now_s)
        assert plan.to_probe(now_s)
        plan.probed(OK, now_s)
    assert len(plan) == 1


def test_an_answer_that_comes_when_the_receiver_is_known_to_be_down_is_forgiven_too() -> None:
    entries = [entry(number) for number in range(1, 6)]
    plan = plan_of(*entries)
    plan.to_send(0)
    for one in entries[:4]:
        plan.answered(one, AWAY, 0)
    assert plan.down
    assert plan.to_probe(10)
    plan.probed(AWAY, 10)
    plan.answered(entries[4], AWAY, 11)
    assert [one.tries for one in entries] == [0] * 5


def test_time_that_the_receiver_asks_for_is_given_and_counts_against_nobody() -> None:
    first, second = entry(1), entry(2)
    plan = plan_of(first, second)
    plan.to_send(0)
    assert plan.answered(first, later(60.0), 0) is Fate.AGAIN
    plan.answered(second, OK, 0.5)
    assert plan.to_send(59.9) == []
    assert next_s(plan, 1) == 60.0
    assert numbers(plan.to_send(60.0)) == [1]
    assert first.tries == 0


def test_time_asked_for_without_saying_how_much_grows() -> None:
    lone = entry(1)
    plan, now_s, waits = plan_of(lone), 0.0, []
    for _ in range(8):
        plan.to_send(now_s)
        plan.answered(lone, later(None), now_s)
        waits.append(next_s(plan, now_s) - now_s)
        now_s += waits[-1]
    assert 0.5 <= waits[0] <= 1.0
    assert PROBE_S_MAX / 2 <= waits[-1] <= PROBE_S_MAX
    assert lone.tries == 0


def test_a_replayed_letter_waits_for_nobody() -> None:
    plan = plan_of(entry(1))
    letter = entry(9, kind="resolved")
    letter.stream = "dead:{s0}:amap"
    plan.add([letter])
    assert sorted(numbers(plan.to_send(0))) == [1, 9]


def test_while_nothing_is_on_its_way_there_is_nothing_to_wait_for() -> None:
    plan = plan_of()
    assert plan.to_send(0) == []
    assert plan.next_s(0) is None
