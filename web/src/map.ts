// The map: land, live phones by cell, rings with their covers. Drawn by maplibre-gl from what ships with the page; no
// tile, glyph or image is asked for. Words on it are of marks.ts.

import 'maplibre-gl/dist/maplibre-gl.css'

import * as maplibre from 'maplibre-gl'
import type { ExpressionSpecification, GeoJSONSource, StyleSpecification } from 'maplibre-gl'
import workerUrl from 'maplibre-gl/dist/maplibre-gl-worker.mjs?url'
import type { Feature, FeatureCollection, Geometry, Position } from 'geojson'
import { feature } from 'topojson-client'
import type { Topology } from 'topojson-specification'
import landUrl from 'world-atlas/land-50m.json?url'
import { h } from './dom'
import { count, countdown, km } from './format'
import { cellRing, circle, coast, polygon, uncompacted, union } from './geo'
import { Marks, type DrawnMark } from './marks'
import { ringAt, ringOf, type RingNow } from './rings'
import { colour, onTheme, stillness } from './theme'
import type { AlertCover, DensityMap, Place, Schedule, ViewAlert } from './types'
import { t } from './words'

const CHINA: [[number, number], [number, number]] = [
  [74, 17.5],
  [135, 53],
]
const GROWTH_MS = 1_200
const COVER_ZOOM_MIN = 3.5
const NOTHING: FeatureCollection = { type: 'FeatureCollection', features: [] }
const SOURCES = ['land', 'coast', 'density', 'covers', 'cells', 'rings', 'draft'] as const
type SourceName = (typeof SOURCES)[number]
/** Five decimals of a degree are a metre. */
const DEGREE = 1e5

export interface Draft {
  location: Place
  schedule: Schedule
  missingSinceMs: number
}

interface MapHandlers {
  select(id: string): void
  /** Somebody put the pin there, or moved it. */
  pin(location: Place): void
}

interface Shown {
  alert: ViewAlert
  ring: RingNow
  /** What is drawn: on its way to `ring.km` while it grows. */
  drawnKm: number
  /** Its ring's features as text, and what they were made of. */
  stamp: string
  text: string
}

interface Cover {
  cover: AlertCover
  /** Of one resolution. */
  inside: string[]
  /** Its features as text, without brackets. */
  text: string
}

function collection(features: Feature<Geometry>[]): FeatureCollection {
  return { type: 'FeatureCollection', features }
}

/** Features as text, without brackets: texts of many are joined. */
function textOf(features: Feature<Geometry>[]): string {
  const rounded = (_: string, value: unknown): unknown => (typeof value === 'number' ? Math.round(value * DEGREE) / DEGREE : value)
  return features.map((one) => JSON.stringify(one, rounded)).join()
}

const shapes = new Map<string, string>()
const SHAPES_MAX = 40_000

/** A cell's geometry as text. Kept: the same cells come again every minute. */
function shapeOf(cell: string): string {
  let known = shapes.get(cell)
  if (known === undefined) {
    known = `{"type":"Polygon","coordinates":[[${cellRing(cell).map(([lng = 0, lat = 0]) => `[${lng.toFixed(5)},${lat.toFixed(5)}]`).join()}]]}`
    if (shapes.size >= SHAPES_MAX) shapes.clear()
    shapes.set(cell, known)
  }
  return known
}

function cellText(cell: string, about: Record<string, unknown>): string {
  return `{"type":"Feature","properties":${JSON.stringify(about)},"geometry":${shapeOf(cell)}}`
}

function style(selected: string | null = null): StyleSpecification {
  const isExercise: ExpressionSpecification = ['==', ['get', 'status'], 'exercise']
  const isSelected: ExpressionSpecification = ['==', ['get', 'id'], selected ?? '']
  const hue: ExpressionSpecification = ['case', isExercise, colour('exercise'), colour('alert')]
  const ghost: ExpressionSpecification = ['==', ['get', 'kind'], 'next']
  const kind = (name: string): ExpressionSpecification => ['==', ['get', 'kind'], name]
  return {
    version: 8,
    sources: Object.fromEntries(
      SOURCES.map((name) => [
        name,
        { type: 'geojson' as const, data: NOTHING, tolerance: name === 'land' || name === 'coast' ? 0.3 : 0.1, buffer: 64 },
      ]),
    ),
    layers: [
      { id: 'sea', type: 'background', paint: { 'background-color': colour('sea') } },
      { id: 'land', type: 'fill', source: 'land', paint: { 'fill-color': colour('land'), 'fill-antialias': false } },
      {
        id: 'density',
        type: 'fill',
        source: 'density',
        paint: {
          'fill-antialias': false,
          'fill-color': ['interpolate', ['linear'], ['get', 'level'], 1.3, colour('density-low'), 3.2, colour('density-mid'), 5.2, colour('density-high')],
          'fill-opacity': ['interpolate', ['linear'], ['get', 'level'], 1.3, 0.7, 5.2, 0.95],
        },
      },
      { id: 'coast', type: 'line', source: 'coast', paint: { 'line-color': colour('coast'), 'line-width': 1 } },
      {
        id: 'cover-inside',
        type: 'fill',
        source: 'covers',
        minzoom: COVER_ZOOM_MIN,
        filter: kind('inside'),
        paint: { 'fill-color': hue, 'fill-opacity': ['case', isSelected, 0.26, 0.13], 'fill-antialias': false },
      },
      {
        id: 'cover-cells',
        type: 'line',
        source: 'cells',
        minzoom: COVER_ZOOM_MIN + 1.5,
        paint: { 'line-color': hue, 'line-width': 0.5, 'line-opacity': 0.4 },
      },
      {
        id: 'cover-edge',
        type: 'line',
        source: 'covers',
        minzoom: COVER_ZOOM_MIN,
        filter: kind('edge'),
        paint: {
          'line-color': hue,
          'line-width': ['interpolate', ['linear'], ['zoom'], 4, 0.4, 8, 1.4],
          'line-opacity': ['case', isSelected, 0.8, 0.45],
        },
      },
      {
        id: 'ring-next',
        type: 'line',
        source: 'rings',
        filter: ghost,
        paint: { 'line-color': hue, 'line-width': 1.2, 'line-opacity': ['case', isSelected, 0.9, 0.6], 'line-dasharray': [3, 3] },
      },
      {
        id: 'ring-glow',
        type: 'line',
        source: 'rings',
        filter: ['all', kind('ring'), isSelected],
        paint: { 'line-color': hue, 'line-width': 9, 'line-opacity': 0.22 },
      },
      {
        id: 'ring',
        type: 'line',
        source: 'rings',
        filter: kind('ring'),
        paint: { 'line-color': hue, 'line-width': ['case', isSelected, 3, 2] },
      },
      { id: 'draft-fill', type: 'fill', source: 'draft', filter: kind('ring'), paint: { 'fill-color': colour('draft'), 'fill-opacity': 0.12 } },
      {
        id: 'draft',
        type: 'line',
        source: 'draft',
        paint: { 'line-color': colour('draft'), 'line-width': 1.8, 'line-dasharray': [1, 2], 'line-opacity': ['case', ghost, 0.6, 1] },
      },
    ],
  }
}

export class MapView {
  private readonly map: maplibre.Map
  private readonly ready: Promise<void>
  private readonly shown = new Map<string, Shown>()
  private readonly covers = new Map<string, Cover>()
  private readonly marks: Marks
  /** Features that come from outside, as text. */
  private readonly given = new Map<SourceName, string>()
  /** What each source has. */
  private readonly sent = new Map<SourceName, string>(SOURCES.map((name) => [name, '']))
  private readonly dirty = new Set<SourceName>()
  private readonly busy = new Set<SourceName>()
  private selected: string | null = null
  private draft: Draft | null = null
  private pin: maplibre.Marker | null = null
  private placing = false
  private growing = 0
  private flushing = 0

  /** Raises an error where the browser has no WebGL. */
  constructor(
    private readonly container: HTMLElement,
    private readonly handlers: MapHandlers,
    private readonly nowMs: () => number,
  ) {
    maplibre.setWorkerUrl(workerUrl)
    this.map = new maplibre.Map({
      container,
      style: style(),
      bounds: CHINA,
      fitBoundsOptions: { padding: 12 },
      attributionControl: false,
      dragRotate: false,
      pitchWithRotate: false,
      touchPitch: false,
      maxPitch: 0,
      minZoom: 0.5,
      maxZoom: 13,
      fadeDuration: 0,
      canvasContextAttributes: { antialias: true },
      locale: { 'Map.Title': t('map.title') },
    })
    this.map.touchZoomRotate.disableRotation()
    this.map.keyboard.disableRotation()
    this.ready = new Promise((resolve) => this.map.once('load', () => resolve()))
    this.marks = new Marks(this.map)
    this.map.on('click', (event) => {
      const id = this.marks.at(event.point.x, event.point.y)
      if (id !== null) this.handlers.select(id)
      else if (this.placing) this.handlers.pin({ lat: event.lngLat.lat, lng: event.lngLat.wrap().lng })
    })
    this.map.on('error', ({ error }) => console.warn('map:', error.message))
    onTheme(() => {
      this.marks.dress()
      void this.dress()
    })
    void this.drawLand()
  }

  // --- what is shown ---------------------------------------------------------------------------------------------

  setDensity(density: DensityMap): void {
    const text = density.cells.map(([cell, phones]) => `{"type":"Feature","properties":{"level":${Math.log10(phones).toFixed(3)},"phones":${phones}},"geometry":${shapeOf(cell)}}`).join()
    this.put('density', text)
    this.container.dataset['cells'] = String(density.cells.length)
  }

  /** Phones under the pointer, for the legend's line; and the mark under it. Looked for once a frame, while nothing moves. */
  onHover(listener: (words: string) => void): void {
    let point: maplibre.Point | null = null
    let asked = 0
    const look = (): void => {
      asked = 0
      const at = point
      const isMark = at !== null && this.marks.point(at.x, at.y)
      if (at === null) this.marks.point(-1000, -1000)
      this.map.getCanvasContainer().classList.toggle('over-mark', isMark)
      const found = at === null || this.map.getLayer('density') === undefined ? undefined : this.map.queryRenderedFeatures(at, { layers: ['density'] })[0]
      listener(found === undefined ? '' : t('map.hover', { n: count(Number(found.properties['phones'] ?? 0)) }))
    }
    const ask = (): void => {
      if (asked === 0 && !this.map.isMoving()) asked = requestAnimationFrame(look)
    }
    this.map.on('mousemove', (event) => {
      point = event.point
      ask()
    })
    this.map.on('mouseout', () => {
      point = null
      ask()
    })
    this.map.on('moveend', () => {
      if (point !== null) ask()
    })
  }

  setAlerts(alerts: ViewAlert[]): void {
    const kept = new Set(alerts.map(({ id }) => id))
    for (const id of this.shown.keys()) {
      if (!kept.has(id)) {
        this.shown.delete(id)
        if (this.covers.delete(id)) this.put('covers')
      }
    }
    for (const alert of alerts) {
      const known = this.shown.get(alert.id)
      if (known !== undefined) known.alert = alert
      else {
        const ring = ringOf(alert, this.nowMs())
        this.shown.set(alert.id, { alert, ring, drawnKm: ring.km, stamp: '', text: '' })
      }
    }
    this.tick()
    this.put('rings')
  }

  setCover(cover: AlertCover): void {
    const alert = this.shown.get(cover.alert_id)?.alert
    if (alert === undefined) return
    const inside = uncompacted(cover.inside, cover.resolution)
    // A shape that goes around a pole cannot be drawn flat as one: its cells can.
    const isPolar = Math.abs(alert.location.lat) + cover.ring_km / 111 > 85
    const about = { id: alert.id, status: alert.status }
    const area = isPolar || inside.length === 0 ? null : union(inside)
    const filled = area === null ? inside.map((cell) => cellText(cell, { ...about, kind: 'inside' })) : [textOf([{ type: 'Feature', properties: { ...about, kind: 'inside' }, geometry: area }])]
    this.covers.set(cover.alert_id, { cover, inside, text: [...filled, ...cover.edge.map((cell) => cellText(cell, { ...about, kind: 'edge' }))].join() })
    this.put('covers')
    if (alert.id === this.selected) this.put('cells')
  }

  /** How many cells are inside of an alert's ring, and how many at its edge. */
  coverOf(id: string): { inside: number; edge: number; resolution: number } | undefined {
    const known = this.covers.get(id)
    return known && { inside: known.inside.length, edge: known.cover.edge.length, resolution: known.cover.resolution }
  }

  select(id: string | null): void {
    if (this.selected === id) return
    this.selected = id
    this.marks.select(id)
    this.put('cells')
    void this.dress()
  }

  /** The marks as they stand on the map now; for tests, and for measuring. */
  marksShown(): DrawnMark[] {
    return this.marks.shown()
  }

  /** Show all of an alert's ring. */
  flyTo(id: string): void {
    const shown = this.shown.get(id)
    if (shown !== undefined) this.fit(shown.alert.location, shown.ring.nextKm ?? shown.ring.km)
  }

  fit(location: Place, radiusKm: number): void {
    const ring = circle(location.lat, location.lng, radiusKm, 36)
    const lngs = ring.map(([lng]) => lng ?? 0)
    const lats = ring.map(([, lat]) => lat ?? 0)
    this.map.fitBounds(
      [Math.min(...lngs), Math.min(...lats), Math.max(...lngs), Math.max(...lats)],
      { padding: 40, maxZoom: 9, animate: !stillness(), duration: 700 },
    )
  }

  home(): void {
    this.map.fitBounds(CHINA, { padding: 12, animate: !stillness(), duration: 700 })
  }

  zoom(steps: number): void {
    this.map.zoomTo(this.map.getZoom() + steps, { animate: !stillness(), duration: 250 })
  }

  /** Move by so many pixels, without easing; for measuring. */
  panBy(x: number, y: number): void {
    this.map.panBy([x, y], { animate: false })
  }

  /** Rings grow at the hour itself; countdowns go on. Called every second, but not while the server is away. */
  tick(): void {
    const nowMs = this.nowMs()
    let grew = false
    const marks = [...this.shown.values()].map((shown) => {
      const { alert } = shown
      const ring = ringOf(alert, nowMs)
      if (ring.km !== shown.ring.km) grew = true
      shown.ring = ring
      const text = ring.nextMs === null ? km(ring.km) : `${km(ring.km)} → ${km(ring.nextKm ?? 0)} ${countdown(ring.nextMs - nowMs)}`
      return { id: alert.id, location: alert.location, isExercise: alert.status === 'exercise', text, nextMs: ring.nextMs }
    })
    this.marks.set(marks)
    if (grew) this.grow()
  }

  // --- a draft's pin -----------------------------------------------------------------------------------------------

  /** Whether a click on the map puts the pin. */
  place(on: boolean): void {
    this.placing = on
    this.container.classList.toggle('placing', on)
  }

  setDraft(draft: Draft | null): void {
    this.draft = draft
    if (draft === null) {
      this.pin?.remove()
      this.pin = null
    } else if (this.pin === null) {
      this.pin = this.makePin(draft.location)
    } else this.pin.setLngLat(draft.location)
    const element = this.pin?.getElement()
    if (element !== undefined && draft !== null) {
      element.setAttribute('aria-label', t('desk.pin.label', { lat: draft.location.lat.toFixed(4), lng: draft.location.lng.toFixed(4) }))
    }
    this.put('draft')
  }

  private makePin(location: Place): maplibre.Marker {
    const element = h('button', { type: 'button', class: 'pin', 'data-testid': 'pin' })
    element.addEventListener('keydown', (event) => {
      const step = event.shiftKey ? 0.1 : 0.01
      const [north, east] = { ArrowUp: [step, 0], ArrowDown: [-step, 0], ArrowLeft: [0, -step], ArrowRight: [0, step] }[event.key] ?? [0, 0]
      if ((north === 0 && east === 0) || this.draft === null) return
      event.preventDefault()
      event.stopPropagation()
      const { lat, lng } = this.draft.location
      this.handlers.pin({ lat: Math.max(-90, Math.min(90, lat + (north ?? 0))), lng: ((lng + (east ?? 0) + 540) % 360) - 180 })
    })
    const marker = new maplibre.Marker({ element, anchor: 'bottom', draggable: true }).setLngLat(location).addTo(this.map)
    marker.on('dragend', () => {
      const { lat, lng } = marker.getLngLat().wrap()
      this.handlers.pin({ lat, lng })
    })
    return marker
  }

  // --- drawing ---------------------------------------------------------------------------------------------------

  private grow(): void {
    if (stillness()) {
      for (const shown of this.shown.values()) shown.drawnKm = shown.ring.km
      this.put('rings')
      return
    }
    const from = new Map([...this.shown].map(([id, { drawnKm }]) => [id, drawnKm]))
    const startMs = performance.now()
    const run = (this.growing += 1)
    const step = (): void => {
      if (run !== this.growing) return
      const part = Math.min(1, (performance.now() - startMs) / GROWTH_MS)
      const eased = 1 - (1 - part) ** 3
      for (const [id, shown] of this.shown) {
        const start = from.get(id) ?? shown.ring.km
        shown.drawnKm = start + (shown.ring.km - start) * eased
      }
      this.put('rings')
      if (part < 1) requestAnimationFrame(step)
    }
    requestAnimationFrame(step)
  }

  /** Have a source drawn anew in the next frame; without a text it is made of what is known by then. */
  private put(name: SourceName, text?: string): void {
    if (text !== undefined) this.given.set(name, text)
    this.dirty.add(name)
    if (this.flushing !== 0) return
    this.flushing = requestAnimationFrame(() => {
      this.flushing = 0
      void this.ready.then(() => this.flush())
    })
  }

  private flush(): void {
    for (const name of this.dirty) {
      const source = this.map.getSource<GeoJSONSource>(name)
      // One at a time: what comes meanwhile is taken up together, at the end of the one before.
      if (source === undefined || this.busy.has(name)) continue
      this.dirty.delete(name)
      void this.send(name, source)
    }
  }

  /** The worker reads a text by itself. An object would be taken apart and put together again in the page's thread. */
  private async send(name: SourceName, source: GeoJSONSource): Promise<void> {
    const made = { rings: () => this.ringText(), covers: () => [...this.covers.values()].map(({ text }) => text).join(), cells: () => this.cellsText(), draft: () => textOf(this.draftFeatures()) }[name as string]
    const text = made === undefined ? (this.given.get(name) ?? '') : made()
    if (name === 'rings') this.container.dataset['rings'] = [...this.shown.values()].map(({ alert, drawnKm }) => `${alert.id}:${Math.round(drawnKm)}`).join(' ')
    if (this.sent.get(name) === text) return
    this.sent.set(name, text)
    this.busy.add(name)
    const url = URL.createObjectURL(new Blob(['{"type":"FeatureCollection","features":[', text, ']}'], { type: 'application/json' }))
    try {
      await source.setData(url)
    } finally {
      URL.revokeObjectURL(url)
      this.busy.delete(name)
      if (this.dirty.has(name)) this.put(name)
    }
  }

  private ringText(): string {
    return [...this.shown.values()]
      .map((shown) => {
        const { alert, ring, drawnKm } = shown
        const { lat, lng } = alert.location
        const stamp = [lat, lng, drawnKm, ring.nextKm, alert.status].join()
        if (stamp !== shown.stamp) {
          const about = { id: alert.id, status: alert.status }
          const drawn = [polygon(circle(lat, lng, drawnKm), { ...about, kind: 'ring' })]
          if (ring.nextKm !== null) drawn.push(polygon(circle(lat, lng, ring.nextKm), { ...about, kind: 'next' }))
          shown.stamp = stamp
          shown.text = textOf(drawn)
        }
        return shown.text
      })
      .join()
  }

  /** The cells of the selected alert's cover one by one. */
  private cellsText(): string {
    const known = this.selected === null ? undefined : this.covers.get(this.selected)
    const alert = this.selected === null ? undefined : this.shown.get(this.selected)?.alert
    return known === undefined || alert === undefined ? '' : known.inside.map((cell) => cellText(cell, { id: alert.id, status: alert.status })).join()
  }

  private draftFeatures(): Feature[] {
    const draft = this.draft
    if (draft === null) return []
    const nowMs = this.nowMs()
    const { km: nowKm } = ringAt(draft.schedule, draft.missingSinceMs, Infinity, nowMs)
    const { lat, lng } = draft.location
    return draft.schedule
      .filter(([, radius]) => radius >= nowKm && radius > 0)
      .map(([, radius]) => polygon(circle(lat, lng, radius), { kind: radius === nowKm ? 'ring' : 'next' }))
  }

  private async drawLand(): Promise<void> {
    const topology = (await (await fetch(landUrl)).json()) as Topology
    const land = topology.objects['land']
    if (land === undefined) return
    const outlines = feature(topology, land)
    const found = collection(outlines.type === 'FeatureCollection' ? outlines.features : [outlines])
    const rings = found.features.flatMap(({ geometry }): Position[][] =>
      geometry.type === 'MultiPolygon' ? geometry.coordinates.flat() : geometry.type === 'Polygon' ? geometry.coordinates : [],
    )
    this.put('land', textOf(found.features))
    this.put('coast', textOf([{ type: 'Feature', properties: {}, geometry: coast(rings) }]))
  }

  /** Colours of the theme that is on now, and what is selected. */
  private async dress(): Promise<void> {
    await this.ready
    for (const layer of style(this.selected).layers) {
      if ('filter' in layer) this.map.setFilter(layer.id, layer.filter)
      for (const [name, value] of Object.entries(layer.paint ?? {})) {
        this.map.setPaintProperty(layer.id, name as never, value as never)
      }
    }
  }
}
