"""The alert desk, without HTTP: who may, what is allowed of a public alert, and everything that goes with an event.

    officer ──> jurisdiction ──> rules ──> audit row ──> one MULTI: event, alert, case, statistics, Idempotency-Key
                    │                                      └─> copied to every shard's log ──> answer ──> audit row
                    └─ 403 and an audit row

Whoever speaks for an officer (`gateway.alerts` for JSON, `gateway.cap` for CAP) comes through here.
"""

from __future__ import annotations

import logging
import secrets
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, Literal, cast
from urllib.parse import quote

import msgspec
import orjson
import redis

from flows.alert_json import AlertRefused, check_alert, merge_alert
from flows.desk import DESK_KEY, DeskAlert, DeskAnswer, RevisionConflict, alert_key
from flows.log import FIRST, LogId, SettingsMismatch, last_id
from gateway.accounts import Caller, OfficerAccount
from gateway.alert_models import (
    CategoryRequest,
    CloseRequest,
    EditRequest,
    PublishRequest,
    Receipt,
    json_of,
    schedule_of,
)
from gateway.audit_log import DONE
from gateway.cases import (
    Case,
    ChildWords,
    Words,
    case_key,
    change_case,
    move_alarm,
    photo_key,
    read_case,
    with_move,
    write_case,
    write_closed,
)
from gateway.errors import Problem
from gateway.idempotency import UNNAMED_S, AlreadyDone, Claim, Record, request_digest
from gateway.jurisdiction import MINISTRY, desk_refusal, division_refusal
from gateway.photos import Photo
from gateway.refusals import refuse
from gateway.runtime import Gateway
from gateway.statistics import CATEGORIES_OF, count_closed, count_published
from geoindex.entries import DEFAULT_EXPIRY_MS, Alert, Schedule, Settings

logger = logging.getLogger(__name__)

PUBLIC_RING_KM_MIN = 10.0
"""Of an actual alert: a smaller ring would look for a phone, not for people who could help."""
COPY_TIMEOUT_S = 10.0
FUTURE_MS = 5 * 60_000
"""How far ahead `missing_since` may lie: clocks differ."""
_ID_ALPHABET = "abcdefghjkmnpqrstvwxyz23456789"
"""Nothing that is confused when it is read out."""
_ID_CHARACTERS = 12

Event = Literal["publish", "update", "close", "category", "photo", "none"]


class NothingChanged(Exception):
    """An edit asks for what is so already: nobody is told anything."""

    def __init__(self, known: DeskAlert) -> None:
        super().__init__(known.alert.alert_id)
        self.known = known


def new_alert_id() -> str:
    """An id that nobody has: 59 random bits, fit for urls and for being read out."""
    return "a-" + "".join(secrets.choice(_ID_ALPHABET) for _ in range(_ID_CHARACTERS))


def page_url(gateway: Gateway, alert_id: str) -> str:
    """The public page of an alert."""
    return f"{gateway.config.base_url}/a/{quote(alert_id, safe='')}"


class DeskService:
    """Publish, edit and close on behalf of an officer. Thread-safe; every method blocks.

    Methods raise Problem: 403 (audited), 404, 409, 412, 422, 429, 503; redis.RedisError: the audit log or the desk
    cannot be reached, and whether an event was made is not known; the same call with the same `idempotency_key` is
    safe then.
    """

    def __init__(self, gateway: Gateway) -> None:
        self._gateway = gateway

    # --- events -----------------------------------------------------------------------------------------------------

    def publish(
        self,
        caller: Caller[OfficerAccount],
        request: PublishRequest,
        idempotency_key: str | None = None,
        alert_id: str | None = None,
    ) -> Receipt:
        """Publish an alert. Returns when every shard's log has it, or after 10 s: then `copied` is false.

        `alert_id`: chosen by the caller, fit for a url; 409 if it is taken. None: one that nobody has.

        Without an `idempotency_key`, an equal request of the same officer within ten minutes is a repetition.
        """
        account = self._account(caller, "alert.publish", "-")
        division = request.division or account.division
        self._check_division(caller, "alert.publish", "-", division)
        digest = request_digest(
            b"publish", (alert_id or "").encode(), orjson.dumps(json_of(request), option=orjson.OPT_SORT_KEYS)
        )
        if idempotency_key is not None:
            claim = Claim(self._gateway.client, caller.actor, f"key:{idempotency_key}", digest)
        else:
            claim = Claim(self._gateway.client, caller.actor, f"request:{digest}", digest, UNNAMED_S)
        found = claim.find()
        if found is not None and found.event is not None and idempotency_key is None:
            known = self._gateway.desk.show(found.alert_id)
            if known is None or not known.is_open(self._gateway.desk.now_ms()):
                claim.forget()  # it ended: whoever publishes the same again wants another alert
                found = None
        if found is not None and found.event is not None:
            return self._repeated(found)
        settings, now_ms = self._gateway.settings(), self._gateway.desk.now_ms()
        if alert_id is None:
            alert_id = found.alert_id if found is not None else new_alert_id()
        alert = _alert(request, alert_id, settings)
        _check_rules(alert, settings, now_ms)
        if request.missing_since > now_ms + FUTURE_MS:
            raise _unfit("missing_since must not lie in the future: is the offset right?")
        record = claim.begin(alert.alert_id)
        if record.event is not None:
            return self._repeated(record)
        alert = replace(alert, alert_id=record.alert_id)
        event = _Publication(self._gateway.client, claim, _case(caller, division, alert, request))
        details = {"division": division, "status": alert.status, **_shape(alert)}
        with self._recorded(caller, "alert.publish", alert.alert_id, details):
            return self._made(event, lambda: self._gateway.desk.publish(alert, companion=event))

    def update(
        self,
        caller: Caller[OfficerAccount],
        alert_id: str,
        request: EditRequest,
        expected_revision: int | None = None,
        idempotency_key: str | None = None,
    ) -> Receipt:
        """Edit an open alert: everyone told hears of it. An edit that changes nothing tells nobody anything."""
        self._check_alert(caller, "alert.update", alert_id)
        claim = self._claim(caller, "update", alert_id, request, idempotency_key)
        if claim is not None and (record := claim.begin(alert_id)).event is not None:
            return self._repeated(record)
        settings = self._gateway.settings()
        changes = _changes(request, settings)
        expected = expected_revision if expected_revision is not None else request.revision
        event = _Edit(self._gateway.client, claim, alert_id, settings, changes, request, expected)
        details = {"fields": sorted(request.model_fields_set - {"revision"}), **_shape_of(changes)}
        with self._recorded(caller, "alert.update", alert_id, details):
            receipt = self._made(
                event,
                lambda: self._gateway.desk.update(alert_id, changes, expected, companion=event),
            )
        self._watch_moves(caller, event.case)
        return receipt

    def close(
        self,
        caller: Caller[OfficerAccount],
        alert_id: str,
        request: CloseRequest,
        expected_revision: int | None = None,
        idempotency_key: str | None = None,
    ) -> Receipt:
        """End an open alert: everyone told hears that the search has ended."""
        self._check_alert(caller, "alert.close", alert_id)
        _check_category(request.outcome, request.category)
        claim = self._claim(caller, "close", alert_id, request, idempotency_key)
        if claim is not None and (record := claim.begin(alert_id)).event is not None:
            return self._repeated(record)
        event = _Closing(self._gateway.client, claim, alert_id, request.outcome, request.category)
        expected = expected_revision if expected_revision is not None else request.revision
        # The category stays out of the audit log: it is erased with the case, rows are not.
        with self._recorded(caller, "alert.close", alert_id, {"outcome": request.outcome}):
            return self._made(
                event, lambda: self._gateway.desk.close(alert_id, request.outcome, expected, companion=event)
            )

    # --- beside the events ------------------------------------------------------------------------------------------

    def set_category(self, caller: Caller[OfficerAccount], alert_id: str, request: CategoryRequest) -> Receipt:
        """Say, or correct, how a search ended, as long as the case is not erased. Nobody is told anything."""
        known = self._check_alert(caller, "alert.category", alert_id)
        client = self._gateway.client

        def change(case: Case | None, pipeline: Any) -> None:
            if case is None or case.outcome is None or case.closed_at_ms is None:
                raise Problem(409, "not-closed", f"alert {alert_id!r} is not closed at this desk: no category yet")
            if case.erased_at_ms is not None:
                raise Problem(410, "erased", f"the case of alert {alert_id!r} is erased; its figures stand")
            _check_category(case.outcome, request.category)
            if case.category != request.category:
                write_case(pipeline, msgspec.structs.replace(case, category=request.category))
                if case.counted:
                    for category, by in ((case.category, -1), (request.category, 1)):
                        count_closed(pipeline, case.closed_at_ms, case.division, case.outcome, category, by)

        with self._recorded(caller, "alert.category", alert_id, {}):
            change_case(client, alert_id, change)
        return self._beside("category", known)

    def set_photo(self, caller: Caller[OfficerAccount], alert_id: str, photo: Photo | None) -> Receipt:
        """Put the picture of an open alert, another one in its place, or none (None). Nobody is told anything."""
        known = self._check_alert(caller, "alert.photo", alert_id)
        desk = self._gateway.desk

        def change(case: Case | None, pipeline: Any) -> None:
            _open(desk.show(alert_id), alert_id, desk.now_ms())
            if case is None:
                raise Problem(409, "no-case", f"alert {alert_id!r} was published at the terminal: it has no picture")
            write_case(pipeline, msgspec.structs.replace(case, photo=None if photo is None else photo.digest))
            if photo is None:
                pipeline.delete(photo_key(alert_id))
            else:
                pipeline.set(photo_key(alert_id), photo.jpeg)

        details = {"sha256": None if photo is None else photo.digest}
        with self._recorded(caller, "alert.photo", alert_id, details):
            change_case(self._gateway.client, alert_id, change, (alert_key(alert_id),))
        return self._beside("photo", known)

    def view(self, caller: Caller[OfficerAccount], alert_id: str) -> tuple[DeskAlert, Case | None]:
        """An alert of the own jurisdiction, and its case."""
        known = self._check_alert(caller, "alert.view", alert_id)
        return known, read_case(self._gateway.client, alert_id)

    def check_desk(self, caller: Caller[OfficerAccount], action: str) -> OfficerAccount:
        """The officer's account. Raises Problem 403, audited, for whoever has no desk."""
        return self._account(caller, action, "-")

    # --- who may ----------------------------------------------------------------------------------------------------

    def _account(self, caller: Caller[OfficerAccount], action: str, target: str) -> OfficerAccount:
        if (refusal := desk_refusal(caller.account)) is not None:
            raise refuse(self._gateway, caller, action, target, refusal)
        return caller.account

    def _check_division(self, caller: Caller[OfficerAccount], action: str, target: str, division: str) -> None:
        if (refusal := division_refusal(caller.account, division)) is not None:
            raise refuse(self._gateway, caller, action, target, refusal, division=division)

    def _check_alert(self, caller: Caller[OfficerAccount], action: str, alert_id: str) -> DeskAlert:
        """The alert, if it is of the officer's jurisdiction. Raises Problem 403, audited; 404."""
        self._account(caller, action, alert_id)
        known = self._gateway.desk.show(alert_id)
        if known is None:
            raise _unknown(alert_id)
        case = read_case(self._gateway.client, alert_id)
        self._check_division(caller, action, alert_id, MINISTRY if case is None else case.division)
        return known

    # --- how it is done ---------------------------------------------------------------------------------------------

    def _claim(
        self,
        caller: Caller[OfficerAccount],
        event: str,
        alert_id: str,
        request: EditRequest | CloseRequest,
        key: str | None,
    ) -> Claim | None:
        if key is None:
            return None
        asked = {name: value for name, value in json_of(request).items() if name in request.model_fields_set}
        body = orjson.dumps(asked, option=orjson.OPT_SORT_KEYS)
        digest = request_digest(event.encode(), alert_id.encode(), body)
        return Claim(self._gateway.client, caller.actor, f"key:{key}", digest)

    @contextmanager
    def _recorded(
        self, caller: Caller[OfficerAccount], action: str, target: str, details: Mapping[str, Any]
    ) -> Iterator[None]:
        """The action between its two audit rows; the second says as what it failed."""
        with self._gateway.audit.recording(caller.actor, action, target, details) as result:
            try:
                yield
            except Problem as problem:
                result["error"] = problem.type
                raise

    def _made(self, event: _Event, make: Callable[[], DeskAnswer]) -> Receipt:
        """Make the event and copy it to the logs; or find that it was made before, or that there is nothing to do."""
        alert_id = event.alert_id
        self._gateway.guards.check_durable()
        try:
            answer = make()
        except AlreadyDone as done:
            return self._repeated(done.record)
        except NothingChanged as nothing:
            return self._receipt("none", alert_id, nothing.known.alert.revision, nothing.known.changed_at_ms, True)
        except RevisionConflict as conflict:
            raise Problem(
                409,
                "revision-conflict",
                f"somebody edited the alert in between: {conflict}; look at it again",
                known_revision=conflict.known,
            ) from None
        except AlertRefused as refused:
            raise _unfit(str(refused)) from None
        assert event.state is not None, "what was made was written"
        copied = self._copied(answer.desk_id)
        return self._receipt(event.name, alert_id, answer.revision, event.state.changed_at_ms, copied)

    def _repeated(self, record: Record) -> Receipt:
        """The answer of the first time; its copies may still be missing."""
        assert record.event is not None
        copied = self._copied(last_id(self._gateway.client, DESK_KEY))
        return self._receipt(cast(Event, record.event), record.alert_id, record.revision, record.at_ms, copied)

    def _beside(self, event: Event, known: DeskAlert) -> Receipt:
        now_ms = self._gateway.desk.now_ms()
        return self._receipt(event, known.alert.alert_id, known.alert.revision, now_ms, True)

    def _receipt(self, event: Event, alert_id: str, revision: int, at_ms: int, copied: bool) -> Receipt:
        url = page_url(self._gateway, alert_id)
        return Receipt.model_construct(
            alert_id=alert_id, event=event, revision=revision, at=at_ms, url=url, copied=copied
        )

    def _copied(self, desk_id: LogId) -> bool:
        """Copy what any log lacks. False: it is durable, and a flow will copy it as soon as that can be."""
        if desk_id == FIRST:
            return True
        gateway = self._gateway
        if gateway.guards.appends_refused() is not None:
            return False
        try:
            gateway.relay.copy_pending()
            return gateway.desk.wait_copied(desk_id, COPY_TIMEOUT_S)
        except (redis.RedisError, SettingsMismatch) as error:
            logger.warning("an alert event is durable, but not copied to every log yet: %s", error)
            return False

    def _watch_moves(self, caller: Caller[OfficerAccount], case: Case | None) -> None:
        """An alarm, and an audit row, for a ring that wanders."""
        if case is None or not case.moves_ms:
            return
        words = move_alarm(case, case.moves_ms[-1])
        if words is not None:
            self._gateway.metrics.alarms.set("alert_moved", words, case.alert_id)
            details = {"moves_within_an_hour": len(case.moves_ms)}
            self._gateway.audit.append(caller.actor, "alert.moved-often", case.alert_id, DONE, details)


# --- what goes into the event's MULTI ---------------------------------------------------------------------------------


class _Event:
    """A `flows.desk.Companion`: the case, the statistics and the Idempotency-Key of one event."""

    name: Event

    def __init__(self, client: redis.Redis, claim: Claim | None, alert_id: str) -> None:
        self.alert_id = alert_id
        self.case: Case | None = None
        """As it is now, and in the end as it was written."""
        self.state: DeskAlert | None = None
        """The alert, as it was written."""
        self._client = client
        self._claim = claim

    def keys(self) -> Sequence[str]:
        claimed = self._claim.keys() if self._claim is not None else ()
        return (case_key(self.alert_id), *claimed)

    def look(self, known: DeskAlert | None, now_ms: int) -> None:
        if self._claim is not None:
            self._claim.look()
        self.case = read_case(self._client, self.alert_id)
        self.check(known, now_ms)

    def check(self, known: DeskAlert | None, now_ms: int) -> None:
        """Raise what forbids the event."""
        raise NotImplementedError

    def write(self, pipeline: Any, state: DeskAlert) -> None:
        self.state = state
        if self._claim is not None:
            self._claim.write(pipeline, self.name, state)
        self.write_case(pipeline, state)

    def write_case(self, pipeline: Any, state: DeskAlert) -> None:
        """Queue what changes of the case."""
        raise NotImplementedError


class _Publication(_Event):
    name = "publish"

    def __init__(self, client: redis.Redis, claim: Claim, case: Case) -> None:
        super().__init__(client, claim, case.alert_id)
        self._new = case

    def check(self, known: DeskAlert | None, now_ms: int) -> None:
        if known is not None:
            raise Problem(409, "id-taken", f"alert {self.alert_id!r} was published before: edit it, or take another id")

    def write_case(self, pipeline: Any, state: DeskAlert) -> None:
        self.case = msgspec.structs.replace(self._new, published_at_ms=state.published_at_ms)
        write_case(pipeline, self.case)
        if self.case.counted:
            count_published(pipeline, state.published_at_ms, self.case.division)


class _Edit(_Event):
    name = "update"

    def __init__(
        self,
        client: redis.Redis,
        claim: Claim | None,
        alert_id: str,
        settings: Settings,
        changes: Mapping[str, Any],
        request: EditRequest,
        expected_revision: int | None,
    ) -> None:
        super().__init__(client, claim, alert_id)
        self._expected_revision = expected_revision
        self._settings = settings
        self._changes = changes
        self._request = request
        self._edited: Case | None = None

    def check(self, known: DeskAlert | None, now_ms: int) -> None:
        known = _open(known, self.alert_id, now_ms)
        if self._expected_revision not in (None, known.alert.revision):
            return  # the desk says so
        try:
            merged = merge_alert(known.alert, self._changes, known.alert.revision, self._settings.default_schedule)
        except ValueError as error:
            raise _unfit(str(error)) from None
        words = None if self.case is None else self.case.words
        edited = None if words is None else _edited_words(words, self._request)
        if words is None and self._request.model_fields_set & set(_WORD_FIELDS):
            raise Problem(
                409, "no-case", f"alert {self.alert_id!r} was published at the terminal: edit its words there"
            )
        if merged == known.alert and edited == words:
            raise NothingChanged(known)
        _check_rules(merged, self._settings, now_ms)
        if "missing_since_ms" in self._changes and merged.missing_since_ms > now_ms + FUTURE_MS:
            raise _unfit("missing_since must not lie in the future: is the offset right?")
        if self.case is not None:
            self._edited = with_move(msgspec.structs.replace(self.case, words=edited), known.alert, merged, now_ms)

    def write_case(self, pipeline: Any, state: DeskAlert) -> None:
        if self._edited is not None:
            self.case = self._edited
            write_case(pipeline, self._edited)


class _Closing(_Event):
    name = "close"

    def __init__(
        self, client: redis.Redis, claim: Claim | None, alert_id: str, outcome: str, category: str | None
    ) -> None:
        super().__init__(client, claim, alert_id)
        self._outcome = outcome
        self._category = category

    def check(self, known: DeskAlert | None, now_ms: int) -> None:
        _open(known, self.alert_id, now_ms)
        if self.case is None and self._category is not None:
            raise Problem(409, "no-case", f"alert {self.alert_id!r} was published at the terminal: it has no category")

    def write_case(self, pipeline: Any, state: DeskAlert) -> None:
        if self.case is not None and self.case.closed_at_ms is None:
            write_closed(pipeline, self.case, self._outcome, self._category, state.changed_at_ms)


# --- from requests ----------------------------------------------------------------------------------------------------

_WORD_FIELDS = ("child", "headline", "place", "text", "contact")


def _alert(request: PublishRequest, alert_id: str, settings: Settings) -> Alert:
    expires_at = request.expires_at
    return Alert(
        alert_id=alert_id,
        revision=1,
        lat=request.location.lat,
        lng=request.location.lng,
        missing_since_ms=request.missing_since,
        schedule=settings.default_schedule if request.schedule is None else schedule_from(request.schedule),
        expires_at_ms=request.missing_since + DEFAULT_EXPIRY_MS if expires_at is None else expires_at,
        status=request.status,
        audience=None if request.audience is None else tuple(request.audience),
    )


def _changes(request: EditRequest, settings: Settings) -> dict[str, Any]:
    """What an edit changes of the alert itself, as `alert_json.merge_alert` takes it."""
    given, changes = request.model_fields_set, dict[str, Any]()
    if "location" in given:
        changes |= {"lat": request.location.lat, "lng": request.location.lng}
    if "missing_since" in given:
        changes["missing_since_ms"] = request.missing_since
    if "schedule" in given:
        changes["schedule"] = settings.default_schedule if request.schedule is None else schedule_from(request.schedule)
    if "expires_at" in given:
        changes["expires_at_ms"] = request.expires_at
    if "audience" in given:
        changes["audience"] = None if request.audience is None else tuple(request.audience)
    return changes


def schedule_from(steps: list[list[float | None]]) -> Schedule:
    """Steps of a request. Raises Problem 422."""
    try:
        return schedule_of(steps)
    except ValueError as error:
        raise _unfit(str(error)) from None


def _case(caller: Caller[OfficerAccount], division: str, alert: Alert, request: PublishRequest) -> Case:
    words = Words(
        child=ChildWords(**json_of(request.child)),
        headline=request.headline,
        place=request.place,
        text=request.text,
        contact=request.contact,
    )
    return Case(
        alert_id=alert.alert_id,
        division=division,
        officer=caller.actor,
        status=alert.status,
        published_at_ms=0,
        words=words,
    )


def _edited_words(words: Words, request: EditRequest) -> Words:
    given, blank = request.model_fields_set, Words()
    changes: dict[str, Any] = {
        name: getattr(request, name) if getattr(request, name) is not None else getattr(blank, name)
        for name in _WORD_FIELDS
        if name in given and name != "child"
    }
    if "child" in given:
        child_blank = ChildWords()
        child = {
            name: getattr(request.child, name)
            if getattr(request.child, name) is not None
            else getattr(child_blank, name)
            for name in request.child.model_fields_set
        }
        changes["child"] = msgspec.structs.replace(words.child, **child)
    return msgspec.structs.replace(words, **changes)


def _shape(alert: Alert) -> dict[str, Any]:
    """Where and how far an alert reaches, for its audit row: nothing of the child."""
    return {
        "lat": alert.lat,
        "lng": alert.lng,
        "missing_since_ms": alert.missing_since_ms,
        "km_max": alert.schedule[-1][1],
        "expires_at_ms": alert.expires_at_ms,
        "audience": None if alert.audience is None else list(alert.audience[:16]),
    }


def _shape_of(changes: Mapping[str, Any]) -> dict[str, Any]:
    shape = {name: changes[name] for name in ("lat", "lng", "missing_since_ms", "expires_at_ms") if name in changes}
    if "schedule" in changes:
        shape["km_max"] = changes["schedule"][-1][1]
    return shape


# --- rules ------------------------------------------------------------------------------------------------------------


def _unfit(detail: str) -> Problem:
    return Problem(422, "does-not-fit", detail)


def _unknown(alert_id: str) -> Problem:
    return Problem(404, "no-such-alert", f"alert {alert_id[:64]!r} was never published")


def _open(known: DeskAlert | None, alert_id: str, now_ms: int) -> DeskAlert:
    if known is None:
        raise _unknown(alert_id)
    if not known.is_open(now_ms):
        raise Problem(409, "closed", f"alert {alert_id!r} was closed as {known.outcome or 'cancelled'}, and stays so")
    return known


def _check_rules(alert: Alert, settings: Settings, now_ms: int) -> None:
    """What this desk asks of an alert beyond `alert_json.check_alert`. Raises Problem 422."""
    try:
        check_alert(alert)
    except ValueError as error:
        raise _unfit(str(error)) from None
    if alert.status == "actual" and alert.schedule[0][1] < PUBLIC_RING_KM_MIN:
        raise Problem(
            422,
            "ring-too-small",
            f"a ring of an actual alert is at least {PUBLIC_RING_KM_MIN:g} km, got {alert.schedule[0][1]:g} km",
        )
    unknown = [name for name in alert.audience or () if name not in settings.partners]
    if unknown:
        raise _unfit(f"audience must name partners of this deployment, got {', '.join(map(repr, unknown[:5]))}")
    if alert.expires_at_ms <= now_ms:
        raise _unfit(
            "expires_at must lie in the future, or nobody is told; it is 72 h after missing_since unless it is given"
        )


def _check_category(outcome: str, category: str | None) -> None:
    allowed = CATEGORIES_OF[outcome]
    if category is not None and category not in allowed:
        expected = ", ".join(allowed) or "none"
        raise _unfit(f"category of {outcome} must be one of {expected}, got {category}")
