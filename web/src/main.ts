// The page: who looks, what the stream brings, and where it goes.

import './style.css'

import { Refusal, Api } from './api'
import { AlertList, AlertPanel, type Words } from './alerts'
import { Charts } from './charts'
import { Desk } from './desk'
import { announce, announcers, h, newId, setText } from './dom'
import { AlertForm } from './form'
import { clock, count, day, duration, km, minute, moment, ms, short } from './format'
import { MapView } from './map'
import { wordsOf } from './problems'
import { ringOf } from './rings'
import { dropKey, keepKey, takeKey } from './session'
import { Stream, type Connection } from './stream'
import { currentTheme, setTheme, startTheme } from './theme'
import type { AlertCover, AlertsEvent, DensityMap, FiguresEvent, Hello, History, MapEvent, ViewAlert } from './types'
import { applyWords, currentLanguage, maybe, onLanguage, setLanguage, t, type Key } from './words'

const COVERS_AT_ONCE = 4
const MAP_OLD_MS = 4 * 60_000
const RELOADED = 'tuanyuan.reloaded'
const REFUSED = 'tuanyuan.refused'
const CLOCK_OFF_MS = 3_000
const NOTICES = '/third-party-notices.txt'

// --- signing in -------------------------------------------------------------------------------------------------------

function toggles(): HTMLElement[] {
  return [
    h('button', { type: 'button', class: 'quiet', t: 'language.other', label: 'language.toggle', 'data-testid': 'language', onclick: () => setLanguage(currentLanguage() === 'zh' ? 'en' : 'zh') }),
    h('button', { type: 'button', class: 'quiet', t: 'theme', label: 'theme.toggle', 'data-testid': 'theme', onclick: () => setTheme(currentTheme() === 'dark' ? 'light' : 'dark') }),
  ]
}

function brand(): HTMLElement {
  return h('h1', { class: 'brand' }, h('span', { class: 'brand-mark', 'aria-hidden': 'true' }), '团圆 ', h('span', { lang: 'en' }, 'Tuanyuan'))
}

function signIn(words: string): void {
  const id = newId('key')
  const key = h('input', { id, type: 'password', autocomplete: 'current-password', spellcheck: 'false', required: true, 'data-testid': 'key' })
  const device = h('input', { type: 'checkbox', 'data-testid': 'remember' })
  const form = h(
    'form',
    {
      class: 'sign-in',
      onsubmit: (event: SubmitEvent) => {
        event.preventDefault()
        const text = key.value.trim()
        if (text === '') return
        keepKey(text, device.checked)
        new Page(text)
      },
    },
    brand(),
    h('p', { class: 'lead', t: 'sign_in.lead' }),
    h('p', { class: 'problem', role: 'alert', hidden: words === '', 'data-testid': 'sign-in-problem' }, words),
    h('div', { class: 'field' }, h('label', { for: id, t: 'sign_in.key' }), key),
    h('label', { class: 'check' }, device, ' ', h('span', { t: 'sign_in.device' })),
    h('div', { class: 'actions' }, h('button', { type: 'submit', class: 'primary', t: 'sign_in', 'data-testid': 'sign-in' })),
    h('div', { class: 'toggles' }, ...toggles()),
  )
  document.body.replaceChildren(h('main', { class: 'gate' }, form), ...announcers())
  applyWords(document)
  key.focus()
}

// --- the view ---------------------------------------------------------------------------------------------------------

interface Tile {
  id: string
  name: Key
  value: (event: FiguresEvent, alerts: ViewAlert[]) => string
  state?: (event: FiguresEvent) => '' | 'warn' | 'bad'
}

function figure(event: FiguresEvent, name: string, write: (value: number) => string): string {
  const value = event.figures[name]
  return value === undefined ? '–' : write(value)
}

function above(event: FiguresEvent, name: string, warn: number, bad: number): '' | 'warn' | 'bad' {
  const value = event.figures[name] ?? 0
  return value >= bad ? 'bad' : value >= warn ? 'warn' : ''
}

const TILES: Tile[] = [
  { id: 'alerts', name: 'tile.alerts', value: (_, alerts) => String(alerts.filter(({ status }) => status === 'actual').length) },
  { id: 'phones', name: 'tile.phones', value: (event) => figure(event, 'devices_live', short) },
  { id: 'pings', name: 'tile.pings', value: (event) => figure(event, 'pings_per_s', short) },
  { id: 'matches', name: 'tile.matches', value: (event) => figure(event, 'matches_per_s', short) },
  { id: 'publish', name: 'tile.publish', value: (event) => figure(event, 'publish_to_queue_p99_ms', ms) },
  { id: 'lag', name: 'tile.lag', value: (event) => figure(event, 'lag_ms', ms), state: (event) => above(event, 'lag_ms', 2_000, 10_000) },
  { id: 'pending', name: 'tile.pending', value: (event) => figure(event, 'queue_pending', short) },
  { id: 'dead', name: 'tile.dead', value: (event) => figure(event, 'dead_letters', count), state: (event) => above(event, 'dead_letters', 1, 100) },
]

class Page {
  private readonly api: Api
  private readonly stream: Stream
  private readonly charts: Charts
  private readonly list: AlertList
  private readonly words = new Map<string, Words>()
  private map: MapView | null = null
  private desk: Desk | null = null
  private panel: AlertPanel | null = null
  private deskForm: HTMLElement | null = null
  private alerts: ViewAlert[] = []
  private hello: Hello | null = null
  private state: Connection = 'connecting'
  private lastFigures: FiguresEvent | null = null
  private mapAtMs: number | null = null
  /** Of the newest map that the gateway has told of; fetched again until it is shown. */
  private mapToldMs: number | null = null
  private fetchesMap = false
  private serverMs = Date.now()
  private serverAt = performance.now()
  private readonly covered = new Map<string, string>()
  private readonly coverQueue: ViewAlert[] = []
  private covering = 0
  private awaited: string | null = null
  private knownRings: Map<string, number> | null = null
  private readonly timer: number

  private readonly chip = h('span', { class: 'chip', 'data-testid': 'connection' })
  private readonly banner = h('div', { class: 'banner', 'data-testid': 'banner', hidden: true })
  private readonly alarms = h('ul', { class: 'alarms', 'data-testid': 'alarms', hidden: true })
  private readonly time = h('time', { class: 'clock', 'data-testid': 'clock' })
  private readonly date = h('span', { class: 'muted' })
  private readonly who = h('span', { class: 'who muted' })
  private readonly side = h('div', { class: 'side-body' })
  private readonly sideBar: HTMLElement
  private readonly open = h('span', { class: 'tally', 'data-testid': 'open-count' })
  private readonly newButton: HTMLButtonElement
  private readonly mapTime = h('span', { 'data-testid': 'map-time' })
  private readonly hover = h('span', { class: 'muted' })
  private readonly version = h('span', {})
  private readonly tiles = new Map<string, HTMLElement>()
  private lastPublish: { value: number; atMs: number } | null = null

  constructor(key: string) {
    this.api = new Api(key)
    this.list = new AlertList((id) => this.select(id, true), () => this.nowMs(), this.words)
    this.charts = new Charts((minutes) => this.api.ask<History>(`/v1/view/history?minutes=${minutes}`))
    this.newButton = h('button', { type: 'button', class: 'primary', t: 'desk.new', hidden: true, 'data-testid': 'desk-new', onclick: () => this.desk?.publish() })
    this.sideBar = h('header', { class: 'bar' }, h('h2', { id: 'open-alerts', tabindex: '-1' }, h('span', { t: 'alerts.title' }), ' ', this.open), this.newButton)
    const canvas = h('div', { class: 'map', 'data-testid': 'map' })
    this.build(canvas)
    this.makeMap(canvas)
    this.showSide()
    onLanguage(() => this.rewrite())
    applyWords(document)
    setText(this.chip, t('connection.connecting'))
    this.stream = new Stream(this.api.headers(), {
      event: (name, data) => this.event(name, data),
      connection: (state) => this.connection(state),
      refused: (refusal) => this.refused(refusal),
    })
    this.timer = window.setInterval(() => this.tick(), 1_000)
    if ('tuanyuanBench' in window) Object.assign(window, { tuanyuanMap: this.map })
  }

  // --- the frame ---------------------------------------------------------------------------------------------------

  private build(canvas: HTMLElement): void {
    const tiles = TILES.map(({ id, name }) => {
      const value = h('b', { 'data-testid': `tile-${id}` }, '–')
      const tile = h('div', { class: 'tile' }, value, h('span', { t: name }))
      this.tiles.set(id, tile)
      return tile
    })
    const key = (kind: string, words: Key): HTMLElement => h('li', {}, h('i', { class: `key ${kind}` }), h('span', { t: words }))
    const legend = h(
      'div',
      { class: 'legend' },
      h('div', { class: 'scale' }, h('span', {}, '20'), h('i', { class: 'ramp' }), h('span', {}, '150 k'), h('span', { t: 'legend.phones' })),
      h('ul', {}, key('ring', 'legend.ring'), key('next', 'legend.next'), key('inside', 'legend.inside'), key('edge', 'legend.edge')),
      h('p', {}, this.mapTime, ' ', this.hover),
    )
    const zoom = h(
      'div',
      { class: 'zoom' },
      h('button', { type: 'button', label: 'map.in', onclick: () => this.map?.zoom(1) }, '+'),
      h('button', { type: 'button', label: 'map.out', onclick: () => this.map?.zoom(-1) }, '−'),
      h('button', { type: 'button', label: 'map.home', onclick: () => this.map?.home() }, '⌂'),
    )
    document.body.replaceChildren(
      h('a', { class: 'skip', href: '#open-alerts', t: 'skip' }),
      h('header', { class: 'top' }, brand(), this.chip, h('div', { class: 'now' }, this.time, this.date), h('div', { class: 'account' }, this.who, ...toggles(), h('button', { type: 'button', class: 'quiet', t: 'sign_out', 'data-testid': 'sign-out', onclick: () => this.signOut('') }))),
      this.banner,
      this.alarms,
      h(
        'main',
        {},
        h('section', { class: 'tiles', label: 'tiles.title' }, ...tiles),
        h('div', { class: 'stage' }, h('section', { class: 'mapbox', label: 'map.title' }, canvas, legend, zoom), h('section', { class: 'side', 'aria-labelledby': 'open-alerts' }, this.sideBar, this.side)),
        this.charts.element,
      ),
      h('footer', {}, h('span', { t: 'footer.times' }), this.version, h('span', { t: 'footer.land' }), h('a', { href: NOTICES, t: 'footer.notices' })),
      ...announcers(),
    )
  }

  private makeMap(canvas: HTMLElement): void {
    try {
      this.map = new MapView(
        canvas,
        {
          select: (id) => this.select(id, false),
          pin: (place) => this.desk?.pin(place),
        },
        () => this.nowMs(),
      )
      this.map.onHover((words) => setText(this.hover, words))
    } catch (problem) {
      console.warn('no map:', problem)
      canvas.replaceChildren(h('p', { class: 'no-map', t: 'map.none' }))
    }
  }

  /** What the side shows: a form, else an alert, else the list. */
  private showSide(): void {
    const shown = this.deskForm ?? this.panel?.element ?? this.list.element
    this.sideBar.hidden = shown !== this.list.element
    this.side.closest('.stage')?.classList.toggle('tall', shown !== this.list.element)
    if (this.side.firstElementChild !== shown) {
      this.side.replaceChildren(shown)
      this.side.scrollTop = 0
    }
  }

  private select(id: string | null, withMap: boolean): void {
    const alert = this.alerts.find((other) => other.id === id)
    this.map?.select(alert?.id ?? null)
    if (this.panel !== null && this.panel.id !== id) {
      this.panel.destroy()
      this.panel = null
    }
    if (alert !== undefined && this.panel === null) {
      this.panel = new AlertPanel(alert, this.api, this.desk, this.map, () => this.nowMs(), () => this.select(null, false))
    }
    if (this.deskForm === null) {
      this.showSide()
      if (this.panel !== null) this.panel.element.focus({ preventScroll: innerWidth > 800 })
      else document.getElementById('open-alerts')?.focus({ preventScroll: true })
    }
    if (withMap && alert !== undefined) this.map?.flyTo(alert.id)
  }

  // --- the stream --------------------------------------------------------------------------------------------------

  private nowMs(): number {
    return this.serverMs + performance.now() - this.serverAt
  }

  private event(name: string, data: unknown): void {
    if (name === 'hello') this.greet(data as Hello)
    else if (name === 'figures') this.takeFigures(data as FiguresEvent)
    else if (name === 'alerts') this.takeAlerts((data as AlertsEvent).alerts)
    else if (name === 'map') void this.fetchMap(data as MapEvent)
  }

  private greet(hello: Hello): void {
    this.serverMs = hello.server_time_ms
    this.serverAt = performance.now()
    if (this.hello !== null && this.hello.version !== hello.version && !this.desk?.isOpen() && sessionStorage.getItem(RELOADED) !== hello.version) {
      sessionStorage.setItem(RELOADED, hello.version)
      location.reload()
      return
    }
    const isFirst = this.hello === null
    this.hello = hello
    if (isFirst && hello.role === 'officer') {
      this.desk = new Desk(this.api, this.map, {
        partners: () => this.partners(),
        nowMs: () => this.nowMs(),
        show: (element) => {
          this.deskForm = element
          this.showSide()
          if (element === null) this.newButton.focus({ preventScroll: true })
        },
        published: (id) => {
          this.awaited = id
          this.select(id, true)
        },
      })
      this.newButton.hidden = false
    }
    this.writeAccount()
    void this.charts.load().then(() => (this.lastPublish ??= this.charts.lastKnown('publish_to_queue_p99_ms')))
  }

  private partners(): string[] {
    const names = Object.keys(this.lastFigures?.figures ?? {}).flatMap((name) => (/^(?:queue_entries|pings_per_s):(.+)$/.exec(name)?.slice(1) ?? []))
    return [...new Set(names)].sort()
  }

  private takeFigures(event: FiguresEvent): void {
    this.lastFigures = event
    if (Math.abs(event.at_ms - this.nowMs()) > CLOCK_OFF_MS) {
      // The machine slept, and the connection outlived it.
      this.serverMs = event.at_ms
      this.serverAt = performance.now()
    }
    this.charts.add(event)
    this.writeFigures()
    const shown = event.alarms.map(({ kind, source, words }) => h('li', {}, h('b', {}, source === '' ? maybe('alarm', kind) : `${maybe('alarm', kind)} ${source}`), ' ', words))
    const text = event.alarms.map(({ kind, source }) => currentLanguage() + kind + source).join()
    if (this.alarms.dataset['shown'] !== text) {
      if (shown.length > 0) announce(t('alarms.on', { n: shown.length }), true)
      this.alarms.dataset['shown'] = text
      this.alarms.replaceChildren(...shown)
      this.alarms.hidden = shown.length === 0
    }
  }

  private writeFigures(): void {
    const event = this.lastFigures
    if (event === null) return
    for (const { id, value, state } of TILES) {
      const tile = this.tiles.get(id)
      if (tile?.firstElementChild instanceof HTMLElement) setText(tile.firstElementChild, value(event, this.alerts))
      if (tile !== undefined) tile.dataset['state'] = state?.(event) ?? ''
    }
    this.writePublish(event)
  }

  /** Seldom is anything published: then the last figure stands, with its time. */
  private writePublish(event: FiguresEvent): void {
    const value = event.figures['publish_to_queue_p99_ms']
    if (value !== undefined) this.lastPublish = { value, atMs: event.at_ms }
    const tile = this.tiles.get('publish')
    if (this.lastPublish === null || !(tile?.firstElementChild instanceof HTMLElement)) return
    const { value: last, atMs } = this.lastPublish
    setText(tile.firstElementChild, ms(last))
    const name = t('tile.publish')
    if (tile.lastElementChild instanceof HTMLElement) setText(tile.lastElementChild, value === undefined ? `${name} · ${minute(atMs)}` : name)
  }

  private takeAlerts(alerts: ViewAlert[]): void {
    this.tell(alerts)
    const isAnother = alerts.map(({ id, revision }) => id + revision).join() !== this.alerts.map(({ id, revision }) => id + revision).join()
    this.alerts = alerts
    setText(this.open, String(alerts.length))
    this.list.set(alerts)
    this.map?.setAlerts(alerts)
    for (const alert of alerts) this.wantCover(alert)
    for (const id of this.covered.keys()) if (!alerts.some((alert) => alert.id === id)) this.covered.delete(id)
    if (this.panel !== null) {
      const alert = alerts.find(({ id }) => id === this.panel?.id)
      if (alert === undefined) this.panel.gone()
      else this.panel.update(alert)
    }
    if (this.awaited !== null && alerts.some(({ id }) => id === this.awaited)) {
      const id = this.awaited
      this.awaited = null
      this.select(id, true)
    }
    if (isAnother && this.hello?.role === 'officer') void this.fetchWords()
    this.writeFigures()
  }

  /** Say what changed; nothing of what was there when the page was opened. */
  private tell(alerts: ViewAlert[]): void {
    const before = this.knownRings
    this.knownRings = new Map(alerts.map(({ id, ring_km }) => [id, ring_km]))
    if (before === null) return
    for (const { id, ring_km } of alerts) {
      const known = before.get(id)
      if (known === undefined) announce(t('say.new', { id, km: km(ring_km) }), true)
      else if (ring_km > known) announce(t('say.grew', { id, km: km(ring_km) }))
    }
    for (const id of before.keys()) if (!this.knownRings.has(id)) announce(t('say.ended', { id }))
  }

  private async fetchWords(): Promise<void> {
    const answer = await this.api.ask<{ alerts: { alert_id: string; headline: string; place: string; child: { name: string } | null }[] }>('/v1/alerts?limit=200').catch(() => null)
    for (const { alert_id, headline, place, child } of answer?.alerts ?? []) {
      this.words.set(alert_id, { title: headline || [child?.name, place].filter((part) => part).join(' · ') })
    }
    for (const id of this.words.keys()) if (!this.alerts.some((alert) => alert.id === id)) this.words.delete(id)
    this.list.tick()
  }

  // --- map and covers ----------------------------------------------------------------------------------------------

  private async fetchMap({ at_ms }: MapEvent): Promise<void> {
    this.mapToldMs = at_ms
    if (this.fetchesMap) return
    this.fetchesMap = true
    const density = await this.api.ask<DensityMap>('/v1/view/map').catch(() => null)
    this.fetchesMap = false
    if (density === null) return
    this.mapAtMs = this.mapToldMs = density.at_ms
    this.map?.setDensity(density)
    this.writeMapTime()
  }

  private writeMapTime(): void {
    const { mapAtMs } = this
    const ageMs = mapAtMs === null ? 0 : this.nowMs() - mapAtMs
    setText(this.mapTime, mapAtMs === null ? t('map.no_density') : t('map.at', { at: moment(mapAtMs, this.nowMs()), age: duration(ageMs) }))
    this.mapTime.classList.toggle('late', ageMs > MAP_OLD_MS)
  }

  /** Each alert's cover is asked for when its ring or revision is another one. */
  private wantCover(alert: ViewAlert): void {
    if (this.map === null) return
    const stamp = `${alert.revision}:${ringOf(alert, this.nowMs()).km}`
    if (this.covered.get(alert.id) === stamp) return
    this.covered.set(alert.id, stamp)
    this.coverQueue.push(alert)
    void this.fetchCovers()
  }

  private async fetchCovers(): Promise<void> {
    if (this.covering >= COVERS_AT_ONCE) return
    this.covering += 1
    for (let alert = this.coverQueue.shift(); alert !== undefined; alert = this.coverQueue.shift()) {
      const { id } = alert
      const cover = await this.api.ask<AlertCover>(`/v1/view/alerts/${encodeURIComponent(id)}/cover`).catch(() => null)
      if (cover === null) this.covered.delete(id)
      else this.map?.setCover(cover)
    }
    this.covering -= 1
  }

  // --- every second ------------------------------------------------------------------------------------------------

  private tick(): void {
    if (this.mapToldMs !== null && this.mapToldMs !== this.mapAtMs) void this.fetchMap({ at_ms: this.mapToldMs })
    const nowMs = this.nowMs()
    setText(this.time, clock(nowMs))
    setText(this.date, day(nowMs))
    this.writeMapTime()
    if (this.state !== 'live') {
      this.writeBanner()
      return
    }
    this.list.tick()
    this.panel?.tick()
    this.map?.tick()
    for (const alert of this.alerts) this.wantCover(alert)
  }

  private connection(state: Connection): void {
    const before = this.state
    this.state = state
    document.documentElement.dataset['connection'] = state
    this.chip.dataset['state'] = state
    setText(this.chip, t(`connection.${state}`))
    this.writeBanner()
    if (state === 'lost') announce(t('connection.lost'), true)
    if (state === 'live' && before === 'lost') announce(t('connection.back'))
  }

  private writeBanner(): void {
    this.banner.hidden = this.state !== 'lost'
    if (this.state !== 'lost') return
    const at = this.lastFigures?.at_ms
    const key = this.stream.isHeard() ? 'banner.silent' : 'banner.lost'
    setText(this.banner, at === undefined ? t('banner.never') : t(key, { at: clock(at), age: duration(this.nowMs() - at) }))
  }

  private writeAccount(): void {
    const { hello } = this
    if (hello === null) return
    setText(this.who, `${hello.name} · ${t(`role.${hello.role}`)}${hello.scope === '' ? '' : ` · ${hello.scope.padEnd(6, '0')}`}`)
    setText(this.version, t('footer.version', { version: hello.version }))
  }

  /** After a change of language. */
  private rewrite(): void {
    setText(this.chip, t(`connection.${this.state}`))
    this.writeBanner()
    this.writeAccount()
    this.writeFigures()
    this.list.tick()
    this.tick()
  }

  // --- the end -----------------------------------------------------------------------------------------------------

  private refused(refusal: Refusal): void {
    this.signOut(refusal.status === 403 ? t('sign_in.partner') : refusal.status === 401 ? t('sign_in.refused') : wordsOf(refusal))
  }

  private signOut(words: string): void {
    this.stream.stop()
    window.clearInterval(this.timer)
    dropKey()
    AlertForm.dropDraft()
    // Loaded anew: nothing of what was shown stays in memory.
    if (words !== '') sessionStorage.setItem(REFUSED, words)
    location.reload()
  }
}

startTheme()
window.addEventListener('hashchange', () => {
  // Another key was put into the address of a page that was open.
  if (location.hash.startsWith('#key=') && takeKey() !== null) location.reload()
})
const key = takeKey()
if (key === null) {
  signIn(sessionStorage.getItem(REFUSED) ?? '')
  sessionStorage.removeItem(REFUSED)
} else new Page(key)
