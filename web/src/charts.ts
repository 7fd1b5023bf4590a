// Charts of what the page is told each second, over the last minutes to a day. Drawn by uPlot.

import 'uplot/dist/uPlot.min.css'

import uPlot from 'uplot'
import { h, setText } from './dom'
import { clock, minute, quantity, ZONE, type Unit } from './format'
import { colour, onTheme } from './theme'
import type { FiguresEvent, History } from './types'
import { maybe, onLanguage, t, type Key } from './words'

interface Spec {
  id: string
  title: Key
  unit: Unit
  /** Names of figures; one that ends in `:` stands for all of its parts. */
  series: string[]
}

const SPECS: Spec[] = [
  { id: 'pings', title: 'chart.pings', unit: 'rate', series: ['pings_per_s:'] },
  { id: 'matches', title: 'chart.matches', unit: 'rate', series: ['matches_per_s'] },
  { id: 'publish', title: 'chart.publish', unit: 'ms', series: ['publish_to_queue_p50_ms', 'publish_to_queue_p99_ms'] },
  { id: 'ping', title: 'chart.ping', unit: 'ms', series: ['ping_to_queue_p50_ms', 'ping_to_queue_p99_ms'] },
  { id: 'lag', title: 'chart.lag', unit: 'ms', series: ['lag_ms:'] },
  { id: 'entries', title: 'chart.entries', unit: 'count', series: ['queue_entries:'] },
  { id: 'pending', title: 'chart.pending', unit: 'count', series: ['queue_pending:'] },
  { id: 'refused', title: 'chart.refused', unit: 'rate', series: ['pings_refused_per_s:', 'pings_turned_away_per_s:'] },
  { id: 'dead', title: 'chart.dead', unit: 'count', series: ['dead_letters:', 'dead_letters'] },
  { id: 'checkpoint', title: 'chart.checkpoint', unit: 'ms', series: ['checkpoint_age_ms:'] },
  { id: 'memory', title: 'chart.memory', unit: 'bytes', series: ['server_memory_bytes', 'flow_memory_bytes', 'gateway_memory_bytes'] },
  { id: 'phones', title: 'chart.phones', unit: 'count', series: ['devices_live'] },
]
const LEGEND_MAX = 6
const COLOURS = 6
const SYNC = uPlot.sync('charts')
const HEIGHT = 116
type Column = (number | null)[]

/** Figures over the shown minutes: columns of one length, the oldest first, folded as the server folds them. */
class Series {
  stepMs = 5_000
  at: number[] = []
  readonly columns = new Map<string, Column>()
  private readonly lastSum = new Map<string, { sum: number; n: number }>()

  load(history: History): void {
    this.stepMs = history.step_s * 1000
    this.at = [...history.at_ms]
    this.columns.clear()
    this.lastSum.clear()
    for (const [name, values] of Object.entries(history.series)) this.columns.set(name, [...values])
  }

  /** Take up one second; what is older than `spanMs` goes. */
  add(event: FiguresEvent, spanMs: number): void {
    const begin = Math.floor(event.at_ms / this.stepMs) * this.stepMs
    const last = this.at.at(-1)
    if (last !== undefined && begin < last) return
    if (last !== begin) {
      this.lastSum.clear()
      // Steps without any figures are gaps.
      for (let at = last === undefined ? begin : Math.max(last + this.stepMs, begin - spanMs); at <= begin; at += this.stepMs) {
        this.at.push(at)
        for (const column of this.columns.values()) column.push(null)
      }
    }
    for (const [name, value] of Object.entries(event.figures)) this.fold(name, value)
    const gone = this.at.findIndex((at) => at > begin - spanMs - this.stepMs)
    if (gone > 0) {
      this.at.splice(0, gone)
      for (const [name, column] of this.columns) {
        column.splice(0, gone)
        if (column.every((value) => value === null)) this.columns.delete(name)
      }
    }
  }

  private fold(name: string, value: number): void {
    let column = this.columns.get(name)
    if (column === undefined) {
      column = new Array<number | null>(this.at.length).fill(null)
      this.columns.set(name, column)
    }
    const index = column.length - 1
    if (name.includes('_per_s')) {
      const known = column[index] ?? null
      const sum = this.lastSum.get(name) ?? { sum: known ?? 0, n: known === null ? 0 : 1 }
      sum.sum += value
      sum.n += 1
      this.lastSum.set(name, sum)
      column[index] = sum.sum / sum.n
    } else column[index] = Math.max(column[index] ?? -Infinity, value)
  }
}

class Chart {
  readonly element: HTMLElement
  private readonly plotted: HTMLElement
  private readonly legend: HTMLElement
  private readonly now: HTMLElement
  private plot: uPlot | null = null
  private names: string[] = []
  private values: HTMLElement[] = []
  private width = 0
  /** Whether it is on the screen, as far as is known; what is not is drawn when it comes there. */
  isSeen = true

  constructor(
    private readonly spec: Spec,
    private readonly series: Series,
    appeared: () => void,
  ) {
    this.plotted = h('div', { class: 'chart-plot', role: 'img' })
    this.legend = h('ul', { class: 'chart-legend' })
    this.now = h('span', { class: 'chart-now' })
    this.element = h(
      'section',
      { class: 'chart', 'data-testid': `chart-${spec.id}` },
      h('header', {}, h('h3', { t: spec.title }), this.now),
      this.plotted,
      this.legend,
    )
    new ResizeObserver(() => this.resize()).observe(this.plotted)
    new IntersectionObserver(
      (entries) => {
        const wasSeen = this.isSeen
        this.isSeen = entries.at(-1)?.isIntersecting ?? true
        if (this.isSeen && !wasSeen) appeared()
      },
      { rootMargin: '100px' },
    ).observe(this.element)
  }

  private shownNames(): string[] {
    const known = [...this.series.columns.keys()].sort()
    const found = this.spec.series.flatMap((name) => (name.endsWith(':') ? known.filter((other) => other.startsWith(name)) : known.filter((other) => other === name)))
    // A total is shown where it has no parts.
    return found.filter((name) => !found.some((other) => other.startsWith(`${name}:`))).sort((a, b) => a.localeCompare(b, 'en', { numeric: true }))
  }

  draw(spanMs: number): void {
    const names = this.shownNames()
    if (this.plot === null || names.join() !== this.names.join()) this.make(names)
    const at = this.series.at.map((ms) => ms / 1000)
    const columns = names.map((name) => this.series.columns.get(name) ?? [])
    const endS = at.at(-1) ?? 0
    this.plot?.batch(() => {
      this.plot?.setData([at, ...columns], false)
      this.plot?.setScale('x', { min: endS - spanMs / 1000, max: endS })
    })
    const last = this.series.at.length - 1
    this.write(this.plot?.cursor.idx ?? last, last)
  }

  /** Make it anew: other series, another theme or language. */
  make(names = this.names): void {
    this.names = names
    this.plot?.destroy()
    const many = names.length > LEGEND_MAX
    const strokes = names.map((_, index) => colour(`series-${(index % COLOURS) + 1}`))
    const axis = { stroke: colour('muted'), grid: { stroke: colour('grid'), width: 1 }, ticks: { show: false }, font: '11px system-ui, sans-serif' }
    this.plot = new uPlot(
      {
        width: Math.max(120, this.plotted.clientWidth),
        height: HEIGHT,
        tzDate: (s) => uPlot.tzDate(new Date(s * 1000), ZONE),
        legend: { show: false },
        cursor: { sync: { key: SYNC.key }, drag: { x: false, y: false }, points: { size: 6 }, y: false },
        padding: [6, 16, 0, 0],
        scales: {
          x: { time: true, auto: false },
          // Nothing is zoomed into: a line along the ground is one.
          y: { range: (_, __, max) => [0, niceTop(max, this.spec.unit)] },
        },
        axes: [
          { ...axis, size: 22, space: 70, values: (_, splits) => splits.map((s) => minute(s * 1000)) },
          { ...axis, size: 52, space: 30, incrs: INCREMENTS[this.spec.unit], values: (_, splits) => splits.map((value) => quantity(value, this.spec.unit)) },
        ],
        series: [{}, ...names.map((name, index) => ({ label: name, stroke: strokes[index] ?? '', width: many ? 1 : 1.6, points: { show: true, size: 5, filter: lonely }, spanGaps: false }))],
        hooks: { setCursor: [(plot) => this.write(plot.cursor.idx ?? this.series.at.length - 1, this.series.at.length - 1)] },
      },
      [[], ...names.map(() => [])],
      this.plotted,
    )
    this.values = []
    const items = names.slice(0, LEGEND_MAX).map((name, index) => {
      const value = h('b', {})
      this.values.push(value)
      const key = h('i', {})
      key.style.background = strokes[index] ?? ''
      return h('li', {}, key, seriesName(name, this.spec), ' ', value)
    })
    if (many) items.push(h('li', {}, t('chart.more', { n: names.length - LEGEND_MAX })))
    if (names.length === 0) items.push(h('li', { class: 'muted' }, t('chart.none')))
    this.legend.replaceChildren(...items)
  }

  /** Values at a point of time. The last one has not ended, so a level may still be missing there: then the one before. */
  private write(index: number, last: number): void {
    const spoken: string[] = []
    this.names.forEach((name, number) => {
      const column = this.series.columns.get(name) ?? []
      const value = column[index] ?? (index === last ? (column[index - 1] ?? null) : null)
      const words = value === null ? '–' : quantity(value, this.spec.unit)
      const place = this.values[number]
      if (place !== undefined) setText(place, words)
      if (number < LEGEND_MAX) spoken.push(`${seriesName(name, this.spec)} ${words}`)
    })
    const at = this.series.at[index]
    setText(this.now, index === last || at === undefined ? '' : clock(at))
    if (index === last) this.plotted.setAttribute('aria-label', `${t(this.spec.title)}: ${spoken.join(', ') || t('chart.none')}`)
  }

  private resize(): void {
    const width = this.plotted.clientWidth
    if (width === this.width || width === 0) return
    this.width = width
    this.plot?.setSize({ width, height: HEIGHT })
  }
}

const DECIMAL = [...Array(13).keys()].flatMap((power) => [1, 2, 5].map((digit) => digit * 10 ** power))
/** Between two lines of a grid: round numbers of whatever is counted. */
const INCREMENTS: Record<Unit, number[]> = {
  count: DECIMAL,
  rate: DECIMAL,
  ms: [1, 2, 5, 10, 20, 50, 100, 200, 500, 1e3, 2e3, 5e3, 1e4, 2e4, 3e4, 6e4, 12e4, 3e5, 6e5, 18e5, 36e5, 72e5, 216e5, 432e5, 864e5],
  bytes: [...Array(40).keys()].map((power) => 2 ** (power + 10)),
}
const LEAST: Record<Unit, number> = { count: 10, rate: 10, ms: 100, bytes: 1 << 20 }

function niceTop(max: number | null, unit: Unit): number {
  return Math.max(LEAST[unit], (max ?? 0) * 1.08)
}

/** Points that no line reaches, for nothing is known before and after them. */
function lonely(plot: uPlot, index: number): number[] {
  const column = plot.data[index] ?? []
  const isKnown = (at: number): boolean => typeof column[at] === 'number'
  return [...column.keys()].filter((at) => isKnown(at) && !isKnown(at - 1) && !isKnown(at + 1))
}

function seriesName(name: string, spec: Spec): string {
  const [head = '', part] = name.split(':')
  if (part === undefined) return maybe('series', head)
  if (spec.id === 'lag' || spec.id === 'checkpoint') return t('series.shard', { n: part })
  if (spec.id === 'refused') return maybe('reason', part)
  return part
}

export const SPANS_MIN = [15, 60, 360, 1440] as const

export class Charts {
  readonly element: HTMLElement
  private readonly series = new Series()
  private readonly charts = SPECS.map((spec) => new Chart(spec, this.series, () => this.ask()))
  private minutes: number = SPANS_MIN[0]
  private waiting: Chart[] = []
  private asked = 0

  constructor(private readonly askHistory: (minutes: number) => Promise<History>) {
    const spans = SPANS_MIN.map((minutes) =>
      h('button', {
        type: 'button',
        t: `span.${minutes}` as Key,
        'aria-pressed': String(minutes === this.minutes),
        'data-testid': `span-${minutes}`,
        onclick: () => {
          this.minutes = minutes
          for (const [index, button] of spans.entries()) button.setAttribute('aria-pressed', String(SPANS_MIN[index] === minutes))
          void this.load()
        },
      }),
    )
    this.element = h(
      'section',
      { class: 'charts', 'data-testid': 'charts' },
      h('header', { class: 'bar' }, h('h2', { t: 'charts.title' }), h('div', { class: 'segments', role: 'group', label: 'charts.span' }, ...spans)),
      h('div', { class: 'chart-grid' }, ...this.charts.map((chart) => chart.element)),
    )
    onTheme(() => this.remake())
    onLanguage(() => this.remake())
  }

  /** Fetch the history; at the beginning, after a loss, and when another span is chosen. */
  async load(): Promise<void> {
    const minutes = this.minutes
    const history = await this.askHistory(minutes).catch(() => null)
    if (history === null || minutes !== this.minutes) return
    this.series.load(history)
    this.draw()
  }

  /** The last time something was known of a figure, and what; within the minutes that are shown. */
  lastKnown(name: string): { value: number; atMs: number } | null {
    const column = this.series.columns.get(name) ?? []
    const index = column.findLastIndex((value) => value !== null)
    const value = column[index]
    const atMs = this.series.at[index]
    return typeof value === 'number' && atMs !== undefined ? { value, atMs } : null
  }

  add(event: FiguresEvent): void {
    this.series.add(event, this.minutes * 60_000)
    if (document.visibilityState === 'visible') this.ask()
  }

  /** Have what is seen drawn, one chart in a frame: all at once would take longer than a frame may. */
  private ask(): void {
    this.waiting = this.charts.filter((chart) => chart.isSeen)
    if (this.asked === 0) this.asked = requestAnimationFrame(() => this.drawNext())
  }

  private drawNext(): void {
    this.waiting.shift()?.draw(this.minutes * 60_000)
    this.asked = this.waiting.length === 0 ? 0 : requestAnimationFrame(() => this.drawNext())
  }

  private draw(): void {
    for (const chart of this.charts) chart.draw(this.minutes * 60_000)
  }

  private remake(): void {
    for (const chart of this.charts) chart.make()
    this.draw()
  }
}

/** Phones told of one alert over time. */
export class ToldChart {
  readonly element = h('div', { class: 'chart-plot', role: 'img', 'data-testid': 'told-chart', label: 'panel.told_chart' })
  private plot: uPlot | null = null

  show(atMs: number[], told: Column, resolved: Column): void {
    this.plot?.destroy()
    this.plot = null
    this.element.dataset['points'] = String(atMs.length)
    if (atMs.length === 0) return
    const axis = { stroke: colour('muted'), grid: { stroke: colour('grid'), width: 1 }, ticks: { show: false }, font: '11px system-ui, sans-serif' }
    const stepped = uPlot.paths.stepped?.({ align: 1 })
    const line = (label: string, stroke: string, fill = ''): uPlot.Series => ({ label, stroke, fill, width: 2, points: { show: false }, ...(stepped === undefined ? {} : { paths: stepped }) })
    const alert = colour('alert')
    const isShort = (atMs.at(-1) ?? 0) - (atMs[0] ?? 0) < 600_000
    this.plot = new uPlot(
      {
        width: Math.max(120, this.element.clientWidth),
        height: 120,
        tzDate: (s) => uPlot.tzDate(new Date(s * 1000), ZONE),
        legend: { show: false },
        cursor: { show: false },
        padding: [8, 16, 0, 0],
        scales: { x: { time: true }, y: { range: (_, __, max) => [0, niceTop(max, 'count')] } },
        axes: [
          { ...axis, size: 22, space: 80, values: (_, splits) => splits.map((s) => (isShort ? clock(s * 1000) : minute(s * 1000))) },
          { ...axis, size: 52, space: 30, values: (_, splits) => splits.map((value) => quantity(value, 'count')) },
        ],
        series: [{}, line('told', alert, `${alert}26`), line('resolved', colour('good'))],
      },
      [atMs.map((ms) => ms / 1000), told, resolved],
      this.element,
    )
  }

  destroy(): void {
    this.plot?.destroy()
    this.plot = null
  }
}
