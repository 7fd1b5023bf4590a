// The open alerts as a list, and one of them as a panel of its own.

import { Refusal, type Api } from './api'
import { ToldChart } from './charts'
import type { Desk } from './desk'
import { h, setText } from './dom'
import { countdown, km, moment, phones } from './format'
import type { MapView } from './map'
import { wordsOf } from './problems'
import { ringOf } from './rings'
import type { AlertDetails, ToldOverTime, ViewAlert } from './types'
import { t } from './words'

/** What officers see of an alert beyond what operators do. */
export interface Words {
  title: string
}

export class AlertList {
  readonly element = h('ol', { class: 'alerts', 'data-testid': 'alerts' })
  private readonly rows = new Map<string, { row: HTMLElement; ring: HTMLElement; told: HTMLElement; title: HTMLElement; about: HTMLElement; button: HTMLElement }>()
  private alerts: ViewAlert[] = []

  constructor(
    private readonly select: (id: string) => void,
    private readonly nowMs: () => number,
    private readonly words: ReadonlyMap<string, Words>,
  ) {}

  set(alerts: ViewAlert[]): void {
    this.alerts = alerts
    const kept = new Set(alerts.map(({ id }) => id))
    for (const [id, { row }] of this.rows) {
      if (!kept.has(id)) {
        row.remove()
        this.rows.delete(id)
      }
    }
    if (alerts.length === 0) this.element.replaceChildren(h('li', { class: 'empty', t: 'alerts.none' }))
    else this.element.querySelector('.empty')?.remove()
    alerts.forEach((alert, index) => {
      const known = this.rows.get(alert.id) ?? this.make(alert)
      if (this.element.children[index] !== known.row) this.element.insertBefore(known.row, this.element.children[index] ?? null)
    })
    this.tick()
  }

  private make(alert: ViewAlert): { row: HTMLElement; ring: HTMLElement; told: HTMLElement; title: HTMLElement; about: HTMLElement; button: HTMLElement } {
    const [ring, told, title, about] = [h('span', { class: 'row-ring' }), h('b', { class: 'row-told' }), h('b', { class: 'row-title' }), h('span', { class: 'row-about muted' })]
    const button = h(
      'button',
      { type: 'button', 'data-testid': 'alert-row', 'data-alert': alert.id, onclick: () => this.select(alert.id) },
      h('span', { class: 'row-main' }, title, about, ring),
      h('span', { class: 'row-count' }, told, h('span', { class: 'muted', t: 'alerts.told' })),
    )
    const row = h('li', { class: `row ${alert.status}` }, button)
    const made = { row, ring, told, title, about, button }
    this.rows.set(alert.id, made)
    return made
  }

  tick(): void {
    const nowMs = this.nowMs()
    for (const alert of this.alerts) {
      const row = this.rows.get(alert.id)
      if (row === undefined) continue
      const words = this.words.get(alert.id)
      const mark = alert.status === 'exercise' ? `${t('status.exercise')} · ` : ''
      setText(row.title, mark + (words?.title || alert.id))
      setText(row.about, `${words === undefined ? `${alert.location.lat.toFixed(2)}, ${alert.location.lng.toFixed(2)}` : alert.id} · ${t('alerts.since', { at: moment(Date.parse(alert.missing_since), nowMs) })}`)
      setText(row.ring, ringWords(alert, nowMs))
      setText(row.told, phones(alert.told))
      const ringKm = String(ringOf(alert, nowMs).km)
      if (row.button.dataset['ringKm'] !== ringKm) row.button.dataset['ringKm'] = ringKm
    }
  }
}

function ringWords(alert: ViewAlert, nowMs: number): string {
  if (alert.state === 'expired') return t('alerts.expired')
  const ring = ringOf(alert, nowMs)
  return ring.nextMs === null ? t('alerts.full', { km: km(ring.km) }) : t('alerts.grows', { km: km(ring.km), next: km(ring.nextKm ?? 0), in: countdown(ring.nextMs - nowMs) })
}

const TOLD_AGAIN_MS = 5_000

export class AlertPanel {
  readonly element: HTMLElement
  private readonly facts = h('dl', { class: 'facts' })
  private readonly ring = h('p', { class: 'big-ring', 'data-testid': 'panel-ring' })
  private readonly grows = h('p', { class: 'muted', 'data-testid': 'panel-grows' })
  private readonly counts = new Map<'told' | 'delivered' | 'acknowledged', HTMLElement>()
  private readonly chart = new ToldChart()
  private readonly cover = h('p', { class: 'hint', 'data-testid': 'panel-cover' })
  private readonly words = h('div', { class: 'case', 'data-testid': 'panel-words' })
  private readonly partners = h('div', {})
  private readonly actions = h('div', { class: 'actions' })
  private readonly problem = h('p', { class: 'problem', role: 'alert', hidden: true })
  private details: AlertDetails | null = null
  private toldMs = -Infinity
  private isToldDue = true
  private isGone = false

  constructor(
    private alert: ViewAlert,
    private readonly api: Api,
    private readonly desk: Desk | null,
    private readonly map: MapView | null,
    private readonly nowMs: () => number,
    leave: () => void,
  ) {
    const count = (name: 'told' | 'delivered' | 'acknowledged'): HTMLElement => {
      const value = h('b', { 'data-testid': `panel-${name}` })
      this.counts.set(name, value)
      return h('div', {}, value, h('span', { class: 'muted', t: `count.${name}` }))
    }
    this.element = h(
      'article',
      {
        class: `panel ${alert.status}`,
        'data-testid': 'panel',
        'data-alert': alert.id,
        tabindex: '-1',
        onkeydown: (event: KeyboardEvent) => {
          if (event.key === 'Escape') leave()
        },
      },
      h('header', { class: 'bar' }, h('h2', {}, alert.status === 'exercise' ? h('span', { class: 'badge', t: 'status.exercise' }) : null, ' ', alert.id), h('button', { type: 'button', class: 'quiet', t: 'panel.back', 'data-testid': 'panel-back', onclick: leave })),
      h('div', { class: 'ringline' }, this.ring, this.grows),
      h('div', { class: 'counts' }, count('told'), count('delivered'), count('acknowledged')),
      h('h3', { t: 'panel.told_chart' }),
      this.chart.element,
      this.words,
      this.facts,
      this.cover,
      this.partners,
      this.problem,
      this.actions,
    )
    this.makeActions()
    this.update(alert)
    void this.askDetails()
  }

  get id(): string {
    return this.alert.id
  }

  private makeActions(): void {
    this.actions.append(
      h('button', { type: 'button', t: 'panel.show', onclick: () => this.map?.flyTo(this.alert.id) }),
      h('a', { class: 'button', href: `/a/${encodeURIComponent(this.alert.id)}`, target: '_blank', rel: 'noopener', t: 'panel.public' }),
    )
    if (this.desk === null) return
    const withDetails = (act: (details: AlertDetails) => void) => () => void this.askDetails().then((details) => details !== null && act(details))
    const picture = h('input', { type: 'file', accept: 'image/jpeg,image/png,image/webp', class: 'unseen', label: 'panel.photo', tabindex: '-1' })
    picture.addEventListener('change', () => {
      const file = picture.files?.[0]
      if (file !== undefined) void this.sendPicture(file)
    })
    this.actions.append(
      picture,
      h('button', { type: 'button', t: 'panel.photo', 'data-officer': true, onclick: () => picture.click() }),
      h('button', { type: 'button', t: 'panel.edit', 'data-officer': true, 'data-testid': 'panel-edit', onclick: withDetails((details) => this.desk?.edit(details)) }),
      h('button', { type: 'button', class: 'danger', t: 'panel.close', 'data-officer': true, 'data-testid': 'panel-close', onclick: withDetails((details) => this.desk?.close(details)) }),
    )
  }

  private async sendPicture(file: File): Promise<void> {
    const words = (await this.desk?.photo(this.alert.id, file)) ?? ''
    if (words === '') await this.askDetails()
    else this.say(words)
  }

  private say(words: string): void {
    this.problem.textContent = words
    this.problem.hidden = words === ''
  }

  update(alert: ViewAlert): void {
    const isAnother = alert.revision !== this.alert.revision
    const hasMore = alert.told !== this.alert.told || alert.retracted !== this.alert.retracted
    this.alert = alert
    for (const [name, value] of this.counts) setText(value, phones(alert[name]))
    this.tick()
    if (isAnother) void this.askDetails()
    if (hasMore) this.isToldDue = true
  }

  /** It was closed, or is not in this jurisdiction any more. */
  gone(): void {
    if (this.isGone) return
    this.isGone = true
    this.element.classList.add('gone')
    setText(this.ring, t('panel.ended'))
    setText(this.grows, '')
    this.actions.replaceChildren()
    this.words.replaceChildren()
  }

  tick(): void {
    if (this.isGone) return
    const nowMs = this.nowMs()
    const ring = ringOf(this.alert, nowMs)
    setText(this.ring, km(ring.km))
    setText(this.grows, this.alert.state === 'expired' ? t('alerts.expired') : ring.nextMs === null ? t('panel.full') : t('panel.grows', { next: km(ring.nextKm ?? 0), in: countdown(ring.nextMs - nowMs) }))
    const cover = this.map?.coverOf(this.alert.id)
    setText(this.cover, cover === undefined ? '' : t('panel.cover', cover))
    this.writeFacts(nowMs)
    if (this.isToldDue && performance.now() - this.toldMs > TOLD_AGAIN_MS) void this.askTold()
  }

  private writeFacts(nowMs: number): void {
    const { alert, details } = this
    const since = Date.parse(alert.missing_since)
    const steps = alert.schedule.map(([hours, radius]) => (hours === null ? km(radius) : `${km(radius)} < ${Number(hours.toFixed(3))} h`)).join(' · ')
    const rows: [string, string][] = [
      [t('fact.missing_since'), moment(since, nowMs)],
      [t('fact.published_at'), moment(Date.parse(alert.published_at), nowMs)],
      [t('fact.expires_at'), moment(Date.parse(alert.expires_at), nowMs)],
      [t('fact.location'), `${alert.location.lat.toFixed(4)}, ${alert.location.lng.toFixed(4)}`],
      [t('fact.schedule'), steps],
      [t('fact.audience'), alert.audience === null ? t('fact.audience.all') : alert.audience.join(', ')],
      [t('fact.revision'), String(alert.revision)],
      [t('fact.published_by'), details?.published_by ?? ''],
    ]
    const shown = rows.filter(([, value]) => value !== '')
    const text = JSON.stringify(shown)
    if (this.facts.dataset['shown'] === text) return
    this.facts.dataset['shown'] = text
    this.facts.replaceChildren(...shown.flatMap(([name, value]) => [h('dt', {}, name), h('dd', {}, value)]))
  }

  private async askTold(): Promise<void> {
    this.toldMs = performance.now()
    this.isToldDue = false
    const told = await this.api.ask<ToldOverTime>(`/v1/view/alerts/${encodeURIComponent(this.alert.id)}/told`).catch(() => null)
    if (told !== null && this.element.isConnected) this.chart.show([...told.at_ms, this.nowMs()], [...told.told, told.told.at(-1) ?? null], [...told.resolved, told.resolved.at(-1) ?? null])
  }

  /** An officer's: the words of the case, and figures by partner. null: not for this one. */
  private async askDetails(): Promise<AlertDetails | null> {
    if (this.desk === null) return null
    try {
      const details = (this.details = await this.api.ask<AlertDetails>(`/v1/alerts/${encodeURIComponent(this.alert.id)}`))
      this.say('')
      this.writeWords(details)
      return details
    } catch (refusal) {
      if (!(refusal instanceof Refusal)) throw refusal
      if (refusal.status === 403) this.actions.querySelectorAll('[data-officer]').forEach((button) => button.remove())
      this.say(wordsOf(refusal))
      return null
    }
  }

  private writeWords(details: AlertDetails): void {
    const { child } = details
    const line = child === null ? '' : [child.name, child.sex === 'unknown' ? '' : t(`sex.${child.sex}`), child.age === null ? '' : t('child.age', { n: child.age })].filter((part) => part !== '').join(' · ')
    const paragraphs = [line, child?.clothes ?? '', child?.features ?? '', details.place, details.text, details.contact].filter((part) => part !== '')
    const picture = details.photo_url === null ? null : h('img', { src: new URL(details.photo_url).pathname + new URL(details.photo_url).search, alt: t('panel.photo.alt') })
    this.words.replaceChildren(...(picture === null ? [] : [picture]), h('div', {}, ...paragraphs.map((part, index) => h(index === 0 ? 'h3' : 'p', {}, part))))
    const partners = details.partners ?? []
    const known = (value: number | '<20' | null): string => (value === null ? '–' : phones(value))
    this.partners.replaceChildren(
      h(
        'table',
        { class: 'partners' },
        h('thead', {}, h('tr', {}, ...(['partner', 'told', 'delivered', 'acknowledged', 'retracted'] as const).map((name) => h('th', { scope: 'col', t: `count.${name}` })))),
        h('tbody', {}, ...partners.map((row) => h('tr', {}, h('th', { scope: 'row' }, row.partner), ...[row.told, row.delivered, row.acknowledged, details.state === 'closed' ? row.retracted : null].map((value) => h('td', { class: 'number' }, known(value)))))),
      ),
    )
  }

  destroy(): void {
    this.chart.destroy()
  }
}
