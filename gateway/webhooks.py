"""Webhooks: a partner's pushes are sent to it, signed after Standard Webhooks, instead of being asked for.

    PUT    /v1/webhook         where to; a signed test event is sent there, and must be accepted
    POST   /v1/webhook/test    another test event; accepted, it makes the webhook active
    GET, DELETE /v1/webhook
    GET    /v1/dead-letters, POST /v1/dead-letters/replay     of polls and webhooks alike

    unverified ──test accepted──> active ──410, or DELETE──> disabled, or none: polls have the pushes again

Every two seconds each gateway looks at all webhooks, and delivers to those whose lease it gets
(`gateway.webhook_worker`); what is not delivered stays in the queue, whatever becomes of webhook and gateway.
"""

from __future__ import annotations

import asyncio
import logging
import secrets as random_secrets
from collections.abc import Sequence
from typing import Annotated, Any, Literal

import anyio.from_thread
import anyio.to_thread
import msgspec
import redis
from fastapi import APIRouter, Query, Request, Response
from pydantic import BaseModel, ConfigDict, Field

from flows.consumers import push_of
from flows.dead_letters import DeadLetter, dead_letter, dead_letters_of_shard, replay
from flows.log import LogId, format_id, parse_id
from flows.server import worth_a_line
from flows.wire import MalformedEntry
from gateway.accounts import PartnerAccount
from gateway.errors import Problem, responses
from gateway.handover import ENTRY_NAME_PATTERN, EntryName
from gateway.identity import PartnerDep
from gateway.keys import SealBroken
from gateway.pushes import EXAMPLE_ID, PushQueues
from gateway.runtime import Gateway, gateway_of
from gateway.webhook_plan import Pace
from gateway.webhook_sender import URL_CHARACTERS_MAX, Answer, Outcome, UrlRefused, WebhookSender, check_url
from gateway.webhook_settings import (
    OLD_SECRET_MS,
    SealedSecret,
    Webhook,
    check_secret,
    new_secret,
    read_webhook,
    read_webhooks,
    replace_webhook,
    sealed_secret,
    secrets_of,
    signed_headers,
)
from gateway.webhook_worker import LEASE_S, LOOK_EVERY_S, Lease, Terms, WebhookWorker, test_event

logger = logging.getLogger(__name__)

ROUND_S = 2.0
TESTS_PER_S, TESTS_BURST = 0.1, 10.0
"""Of one partner: a test is a request to an address of its choice."""
LETTERS_MAX = 100
"""Dead letters of one answer, with at most 1,000 devices each."""
REPLAY_IDS_MAX = 1_000
Strict = ConfigDict(extra="forbid", strict=True)


# --- the deliveries of all partners -----------------------------------------------------------------------------------


class WebhookDeliveries:
    """Delivers to every active webhook whose lease this gateway gets. Runs in the gateway's event loop."""

    def __init__(
        self,
        gateway: Gateway,
        loop: asyncio.AbstractEventLoop,
        queues: PushQueues,
        pace: Pace | None = None,
        round_s: float = ROUND_S,
        look_every_s: float = LOOK_EVERY_S,
        lease_s: float = LEASE_S,
    ) -> None:
        self._gateway = gateway
        self._loop = loop
        self._queues = queues
        self._pace = pace or Pace()
        self._round_s = round_s
        self._look_every_s = look_every_s
        self._lease_s = lease_s
        self._workers: dict[str, tuple[Webhook, WebhookWorker, asyncio.Task[None]]] = {}
        self._wake = asyncio.Event()
        self._stopping = False
        self._supervisor: asyncio.Future[Any] | None = None

    def start(self) -> None:
        """Begin. From a thread."""
        self._supervisor = asyncio.run_coroutine_threadsafe(self._run(), self._loop)  # type: ignore[assignment]

    def stop(self) -> None:
        """End when the requests on their way are answered. From a thread."""
        assert self._supervisor is not None, "it was started"
        self._stopping = True
        self._loop.call_soon_threadsafe(self._wake.set)
        self._supervisor.result()

    def look_now(self) -> None:
        """A webhook has changed. From the loop."""
        self._wake.set()

    async def _run(self) -> None:
        failures = 0
        while not self._stopping:
            self._wake.clear()
            try:
                await self._round()
                failures = 0
            except Problem:
                pass  # there are no logs yet
            except redis.RedisError as error:
                failures += 1
                if worth_a_line(failures):
                    logger.warning("webhooks cannot be looked at: %s", error)
            try:
                async with asyncio.timeout(self._round_s):
                    await self._wake.wait()
            except TimeoutError:
                pass
        for _, worker, _ in self._workers.values():
            worker.stop()
        if self._workers:
            await asyncio.wait([task for _, _, task in self._workers.values()])

    async def _round(self) -> None:
        partners, found, settings = await anyio.to_thread.run_sync(self._look)
        for name, (webhook, worker, task) in list(self._workers.items()):
            if task.done():
                del self._workers[name]
                if (error := task.exception()) is not None:
                    # A fault of ours. It begins anew, and stops no other partner's deliveries.
                    logger.error("%s: webhook worker failed", name, exc_info=error)
                if worker.gone:
                    await anyio.to_thread.run_sync(self._disable, name, webhook)
                    found.pop(name, None)
            elif found.get(name) != webhook:
                worker.stop()
        for partner in partners:
            webhook_now = found.get(partner.name)
            if webhook_now is None or webhook_now.state != "active" or partner.name in self._workers:
                continue
            await self._begin(partner, webhook_now, settings.shard_count)
        self._gateway.metrics.gauge("webhooks_delivered_to", len(self._workers))

    def _look(self) -> tuple[list[PartnerAccount], dict[str, Webhook], Any]:
        gateway = self._gateway
        settings = gateway.settings()
        partners = [partner for partner in gateway.accounts.partners() if partner.enabled]
        return partners, read_webhooks(gateway.client, [partner.name for partner in partners]), settings

    async def _begin(self, partner: PartnerAccount, webhook: Webhook, shard_count: int) -> None:
        gateway = self._gateway
        timeout_s = gateway.config.webhook_timeout_s
        try:
            opened = [
                (
                    secret.until_ms,
                    secrets_of(gateway.sealer, partner.name, msgspec.structs.replace(webhook, secrets=(secret,)), 0)[0],
                )
                for secret in webhook.secrets
            ]
            sender = WebhookSender(webhook.url, timeout_s, gateway.config.webhook_private_addresses)
        except (SealBroken, UrlRefused) as problem:
            logger.error("%s: webhook cannot be delivered to: %s", partner.name, problem)
            return
        lease = Lease(gateway.client, partner.name, self._queues.consumer, timeout_s + self._lease_s)
        if not await anyio.to_thread.run_sync(lease.take):
            await sender.close()
            return

        def current_secrets() -> Sequence[str]:
            now_ms = gateway.clock.now_ms()
            return [secret for until_ms, secret in opened if until_ms is None or now_ms < until_ms]

        terms = Terms(
            partner.name,
            partner.index,
            shard_count,
            self._queues.consumer,
            timeout_s,
            current_secrets,
            self._pace,
            self._look_every_s,
        )
        worker = WebhookWorker(
            gateway.client, self._queues.watcher, sender, lease, terms, gateway.metrics, gateway.clock.now_ms
        )
        task = asyncio.ensure_future(worker.run())
        task.add_done_callback(lambda _: self._wake.set())
        self._workers[partner.name] = webhook, worker, task

    def _disable(self, partner: str, webhook: Webhook) -> None:
        """The receiver answered 410."""
        logger.warning("%s: webhook is disabled: it answered 410", partner)
        disabled = msgspec.structs.replace(
            webhook, state="disabled", reason="answered 410", changed_at_ms=round(self._gateway.clock.now_ms())
        )
        replace_webhook(self._gateway.client, partner, webhook, disabled)


def start(gateway: Gateway) -> WebhookDeliveries:
    """Called by the gateway in a thread of its loop, after the queues."""
    deliveries = WebhookDeliveries(gateway, anyio.from_thread.run(_running_loop), gateway.service(PushQueues))
    deliveries.start()
    return deliveries


async def _running_loop() -> asyncio.AbstractEventLoop:
    return asyncio.get_running_loop()


# --- what travels -----------------------------------------------------------------------------------------------------

EXAMPLE_URL = "https://partner.example.com/tuanyuan"


class WebhookIn(BaseModel):
    """Where pushes are to be sent."""

    model_config = Strict

    url: str = Field(
        min_length=1,
        max_length=URL_CHARACTERS_MAX,
        description="https, and its name must resolve to public addresses. Redirects are not followed.",
        examples=[EXAMPLE_URL],
    )
    secret: str | None = Field(
        None,
        max_length=100,
        description="What deliveries are signed with, if it is to be yours: whsec_ and base64 of 24 to 64 bytes. "
        "None: the one there is, or a new one.",
        examples=[None],
    )
    rotate_secret: bool = Field(
        False, description="Make a new secret. The old one goes on signing beside it for a day.", examples=[False]
    )


class TestOut(BaseModel):
    """What came of a test event."""

    model_config = Strict

    accepted: bool = Field(description="It was answered with 2xx.", examples=[True])
    status: int | None = Field(description="The answer's; null: there was none.", examples=[200])
    reason: str = Field(description="In words.", examples=["answered 200"])


class WebhookOut(BaseModel):
    """A webhook as it stands."""

    model_config = Strict

    url: str = Field(examples=[EXAMPLE_URL])
    state: Literal["unverified", "active", "disabled"] = Field(
        description="`unverified`: no test event was accepted yet; `active`: it has the pushes; `disabled`: it "
        "answered 410. Unless it is active, polls have the pushes.",
        examples=["active"],
    )
    reason: str = Field(description="Why it is not active.", examples=[""])
    created_at: int = Field(description="ms since 1970, UTC.", examples=[1764000000000])
    changed_at: int = Field(description="ms since 1970, UTC.", examples=[1764000000000])
    verified_at: int | None = Field(description="When a test event was last accepted: ms.", examples=[1764000000000])
    old_secret_until: int | None = Field(description="So long the old secret goes on signing: ms.", examples=[None])
    secret: str | None = Field(
        None, description="Only in the answer to the request that made it; it is not shown again.", examples=[None]
    )
    test: TestOut | None = Field(None, description="Of the test event that this request sent.")


class DeadPush(BaseModel):
    """The push that a dead letter holds."""

    model_config = Strict

    alert_id: str = Field(examples=["330106-20261124-0001"])
    revision: int = Field(ge=1, examples=[1])
    kind: Literal["alert", "update", "resolved"] = Field(examples=["alert"])
    ring_km: float = Field(examples=[100.0])
    at: int = Field(description="ms since 1970, UTC.", examples=[1764000000000])
    device_ids: list[str] = Field(examples=[["phone-1"]])


class DeadLetterOut(BaseModel):
    """A push that was handed over too often and never acknowledged, or not accepted by the webhook."""

    model_config = Strict

    id: str = Field(description="Its name among the dead letters.", examples=["s3:1764000000000-0"])
    entry_id: str = Field(
        description="The queue entry's id: the same as at its deliveries.",
        pattern=ENTRY_NAME_PATTERN,
        examples=[EXAMPLE_ID],
    )
    group: str = Field(description="Who could not deal with it: `api` is polls and webhook.", examples=["api"])
    deliveries: int = Field(ge=0, description="How often it was tried.", examples=[5])
    died_at: int = Field(description="ms since 1970, UTC.", examples=[1764000000000])
    reason: str = Field(examples=["delivered 5 times and never acknowledged"])
    replayed: bool = Field(description="It is on its way again.", examples=[False])
    push: DeadPush | None = Field(description="null: it cannot be decoded.")


class DeadLettersOut(BaseModel):
    """A page of dead letters."""

    model_config = Strict

    dead_letters: list[DeadLetterOut] = Field(max_length=LETTERS_MAX)
    next: str | None = Field(description="`after` of the next page; null: there is none.", examples=[None])


class ReplayIn(BaseModel):
    """Dead letters to be handed over once more."""

    model_config = Strict

    ids: list[Annotated[str, Field(max_length=100)]] = Field(
        min_length=1, max_length=REPLAY_IDS_MAX, examples=[["s3:1764000000000-0"]]
    )


class ReplayOut(BaseModel):
    """What came of a replay."""

    model_config = Strict

    replayed: int = Field(ge=0, description="They come again within seconds, under their entries' ids.", examples=[1])
    unknown: list[str] = Field(description="No dead letters of yours have these ids.", examples=[[]])


# --- endpoints: the webhook -------------------------------------------------------------------------------------------

router = APIRouter(tags=["webhooks"])


@router.put(
    "/v1/webhook",
    summary="Have pushes sent to a url",
    responses=responses(400, 401, 403, 409, 413, 422, 429, 503),
)
async def put_webhook(request: Request, caller: PartnerDep, body: WebhookIn) -> WebhookOut:
    """Sends a signed test event there, and makes the webhook active if it is accepted.

    If it is not, an active webhook stays as it was (422). Where there was none, the url is kept as `unverified`, so
    that you can give your receiver the secret of the answer and then ask for another test.
    """
    gateway = gateway_of(request)
    partner = caller.account
    try:
        check_url(body.url, gateway.config.webhook_private_addresses)
        if body.secret is not None:
            check_secret(body.secret)
    except ValueError as error:
        raise Problem(422, "webhook-refused", str(error)) from None
    if body.secret is not None and body.rotate_secret:
        raise Problem(422, "webhook-refused", "either secret or rotate_secret must be given, got both")
    known = await anyio.to_thread.run_sync(read_webhook, gateway.client, partner.name)
    now_ms = round(gateway.clock.now_ms())
    made = None
    if body.secret is None and (known is None or body.rotate_secret):
        made = new_secret()
    kept = _secrets_beside(gateway, partner.name, known, body.secret or made, now_ms)
    webhook = Webhook(
        url=body.url,
        state="unverified",
        secrets=kept,
        created_at_ms=now_ms if known is None else known.created_at_ms,
        changed_at_ms=now_ms,
    )
    test = await _test(gateway, partner, webhook)
    if not test.accepted and known is not None and known.state == "active":
        raise Problem(
            422, "webhook-not-verified", f"the test event must be accepted, got: {test.reason}; nothing was changed"
        )
    webhook = _tested(gateway, webhook, test)
    await _replace(gateway, partner.name, known, webhook)
    return _webhook_out(gateway, webhook, made, test)


@router.get("/v1/webhook", summary="The webhook as it stands", responses=responses(400, 401, 403, 404, 429, 503))
def get_webhook(request: Request, caller: PartnerDep) -> WebhookOut:
    """Without its secret."""
    gateway = gateway_of(request)
    return _webhook_out(gateway, _known(read_webhook(gateway.client, caller.name)))


@router.delete(
    "/v1/webhook",
    summary="Have pushes sent nowhere",
    status_code=204,
    response_class=Response,
    responses=responses(400, 401, 403, 404, 409, 429, 503),
)
async def delete_webhook(request: Request, caller: PartnerDep) -> Response:
    """Requests on their way are finished. What was not accepted stays in the queue, for polls or another webhook."""
    gateway = gateway_of(request)
    known = _known(await anyio.to_thread.run_sync(read_webhook, gateway.client, caller.name))
    await _replace(gateway, caller.name, known, None)
    return Response(status_code=204)


@router.post(
    "/v1/webhook/test",
    summary="Send a test event to the webhook",
    responses=responses(400, 401, 403, 404, 409, 422, 429, 503),
)
async def test_webhook(request: Request, caller: PartnerDep) -> WebhookOut:
    """Accepted, it makes the webhook active, also one that was disabled. Not accepted, it changes nothing."""
    gateway = gateway_of(request)
    known = _known(await anyio.to_thread.run_sync(read_webhook, gateway.client, caller.name))
    test = await _test(gateway, caller.account, known)
    webhook = known
    if test.accepted:
        webhook = _tested(gateway, known, test)
        await _replace(gateway, caller.name, known, webhook)
    return _webhook_out(gateway, webhook, None, test)


def _known(webhook: Webhook | None) -> Webhook:
    if webhook is None:
        raise Problem(404, "no-webhook", "there is no webhook; PUT /v1/webhook makes one")
    return webhook


def _secrets_beside(
    gateway: Gateway, partner: str, known: Webhook | None, secret: str | None, now_ms: int
) -> tuple[SealedSecret, ...]:
    """Those of a webhook that gets this secret (None: keeps its own), the one before it for a while."""
    if secret is None:
        assert known is not None
        return known.secrets
    new = sealed_secret(gateway.sealer, partner, secret)
    if known is None:
        return (new,)
    return new, msgspec.structs.replace(known.secrets[0], until_ms=now_ms + OLD_SECRET_MS)


async def _test(gateway: Gateway, partner: PartnerAccount, webhook: Webhook) -> TestOut:
    gateway.buckets.check(f"webhook-tests:{partner.name}", "webhook tests", TESTS_PER_S, TESTS_BURST)
    now_ms = gateway.clock.now_ms()
    body = test_event(partner.name, now_ms)
    message_id = f"test:{partner.index}-{random_secrets.token_hex(8)}"
    try:
        secrets = secrets_of(gateway.sealer, partner.name, webhook, now_ms)
    except SealBroken:
        raise Problem(
            409, "secret-lost", "the webhook's secret cannot be read any more: delete the webhook, and make it anew"
        ) from None
    headers = signed_headers(secrets, message_id, body, now_ms)
    sender = WebhookSender(webhook.url, gateway.config.webhook_timeout_s, gateway.config.webhook_private_addresses)
    try:
        answer: Answer = await sender.post(body, headers)
    finally:
        await sender.close()
    gateway.metrics.count("webhook_deliveries_total", partner=partner.name, kind="test", outcome=answer.outcome.value)
    return TestOut(accepted=answer.outcome is Outcome.ACCEPTED, status=answer.status, reason=answer.reason)


def _tested(gateway: Gateway, webhook: Webhook, test: TestOut) -> Webhook:
    now_ms = round(gateway.clock.now_ms())
    if not test.accepted:
        return msgspec.structs.replace(webhook, state="unverified", reason=test.reason)
    return msgspec.structs.replace(webhook, state="active", reason="", verified_at_ms=now_ms, changed_at_ms=now_ms)


async def _replace(gateway: Gateway, partner: str, known: Webhook | None, new: Webhook | None) -> None:
    if not await anyio.to_thread.run_sync(replace_webhook, gateway.client, partner, known, new):
        raise Problem(409, "webhook-changed", "somebody changed the webhook in between; look at it and ask again")
    gateway.service(WebhookDeliveries).look_now()


def _webhook_out(
    gateway: Gateway, webhook: Webhook, secret: str | None = None, test: TestOut | None = None
) -> WebhookOut:
    now_ms = gateway.clock.now_ms()
    old = [one.until_ms for one in webhook.secrets if one.until_ms is not None and one.until_ms > now_ms]
    return WebhookOut(
        url=webhook.url,
        state=webhook.state,
        reason=webhook.reason,
        created_at=webhook.created_at_ms,
        changed_at=webhook.changed_at_ms,
        verified_at=webhook.verified_at_ms,
        old_secret_until=old[0] if old else None,
        secret=secret,
        test=test,
    )


# --- endpoints: dead letters ------------------------------------------------------------------------------------------


@router.get("/v1/dead-letters", summary="Pushes that were given up", responses=responses(400, 401, 403, 422, 429, 503))
def list_dead_letters(
    request: Request,
    caller: PartnerDep,
    letters_max: Annotated[int, Query(alias="max", ge=1, le=LETTERS_MAX, description="Of one page.")] = 20,
    after: Annotated[
        str | None, Query(max_length=100, description="`next` of the page before.", examples=["s3:1764000000000-0"])
    ] = None,
) -> DeadLettersOut:
    """By shard, and by the time when they were given up."""
    gateway = gateway_of(request)
    partner = caller.account
    settings = gateway.settings()
    shard, behind = (0, None) if after is None else _letter_name(after)
    found: list[DeadLetter] = []
    while shard < settings.shard_count and len(found) <= letters_max:
        found += dead_letters_of_shard(gateway.client, partner.name, shard, letters_max + 1 - len(found), behind)
        shard, behind = shard + 1, None
    more = len(found) > letters_max
    found = found[:letters_max]
    return DeadLettersOut(
        dead_letters=[_letter_out(letter, partner.index) for letter in found],
        next=_name_of(found[-1]) if more else None,
    )


@router.post(
    "/v1/dead-letters/replay",
    summary="Hand dead letters over once more",
    responses=responses(400, 401, 403, 413, 422, 429, 503),
)
def replay_dead_letters(request: Request, caller: PartnerDep, body: ReplayIn) -> ReplayOut:
    """To polls or to the webhook, whichever is in use; once acknowledged, or accepted, they are gone."""
    gateway = gateway_of(request)
    shard_count = gateway.settings().shard_count
    letters: list[DeadLetter] = []
    unknown: list[str] = []
    for text in dict.fromkeys(body.ids):
        try:
            shard, dead_id = _letter_name(text)
        except Problem:
            letter = None
        else:
            letter = None if shard >= shard_count else dead_letter(gateway.client, caller.name, shard, dead_id)
        if letter is None:
            unknown.append(text)
        else:
            letters.append(letter)
    replayed = replay(gateway.client, [letter for letter in letters if not letter.replayed])
    return ReplayOut(replayed=replayed, unknown=unknown)


def _name_of(letter: DeadLetter) -> str:
    return f"s{letter.shard}:{format_id(letter.dead_id)}"


def _letter_name(text: str) -> tuple[int, LogId]:
    """Shard and id of a dead letter. Raises Problem 422."""
    shard, colon, dead_id = text.partition(":")
    ms, dash, sequence = dead_id.partition("-")
    numbers = (shard[1:], ms, sequence)
    if (
        shard[:1] != "s"
        or not colon
        or not dash
        or not all(n.isascii() and n.isdigit() and len(n) < 20 for n in numbers)
    ):
        raise Problem(422, "no-letter-name", f"a dead letter's id must be like s3:1764000000000-0, got {text!r}")
    if max(int(ms), int(sequence)) >= 1 << 63:
        raise Problem(422, "no-letter-name", f"a dead letter's id must be like s3:1764000000000-0, got {text!r}")
    return int(shard[1:]), parse_id(dead_id)


def _letter_out(letter: DeadLetter, partner_index: int) -> DeadLetterOut:
    try:
        push = push_of(letter.fields)
    except MalformedEntry:
        held = None
    else:
        held = DeadPush(
            alert_id=push.alert_id,
            revision=push.revision,
            kind=push.kind,  # type: ignore[arg-type]
            ring_km=push.ring_km,
            at=push.at_ms,
            device_ids=list(push.device_ids),
        )
    return DeadLetterOut(
        id=_name_of(letter),
        entry_id=str(EntryName(letter.shard, partner_index, letter.entry_id)),
        group=letter.group,
        deliveries=letter.delivery_count,
        died_at=letter.dead_id[0],
        reason=letter.reason,
        replayed=letter.replayed,
        push=held,
    )
