// The map: land, live phones by cell, rings with their covers. Drawn by maplibre-gl from what ships with the page; no
// tile, glyph or image is asked for. Words on it are HTML.

import 'maplibre-gl/dist/maplibre-gl.css'

import * as maplibre from 'maplibre-gl'
import type { ExpressionSpecification, GeoJSONSource, StyleSpecification } from 'maplibre-gl'
import workerUrl from 'maplibre-gl/dist/maplibre-gl-worker.mjs?url'
import type { Feature, FeatureCollection, Geometry, Position } from 'geojson'
import { feature } from 'topojson-client'
import type { Topology } from 'topojson-specification'
import landUrl from 'world-atlas/land-50m.json?url'
import { h, setText } from './dom'
import { count, countdown, km } from './format'
import { cellRing, circle, coast, polygon, uncompacted, union } from './geo'
import { ringAt, ringOf, type RingNow } from './rings'
import { colour, onTheme, stillness } from './theme'
import type { AlertCover, DensityMap, Place, Schedule, ViewAlert } from './types'
import { t } from './words'

const CHINA: [[number, number], [number, number]] = [
  [74, 17.5],
  [135, 53],
]
const GROWTH_MS = 1_200
const MARK_HEIGHT = 22
const COVER_ZOOM_MIN = 3.5
const NOTHING: FeatureCollection = { type: 'FeatureCollection', features: [] }
type SourceName = 'land' | 'coast' | 'density' | 'covers' | 'rings' | 'draft'

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
  marker: maplibre.Marker
  button: HTMLButtonElement
  label: HTMLSpanElement
}

interface Cover {
  cover: AlertCover
  /** Of one resolution. */
  inside: string[]
  area: Geometry | null
}

function collection(features: Feature<Geometry>[]): FeatureCollection {
  return { type: 'FeatureCollection', features }
}

function style(): StyleSpecification {
  const isExercise: ExpressionSpecification = ['==', ['get', 'status'], 'exercise']
  const isSelected: ExpressionSpecification = ['get', 'selected']
  const hue: ExpressionSpecification = ['case', isExercise, colour('exercise'), colour('alert')]
  const ghost: ExpressionSpecification = ['==', ['get', 'kind'], 'next']
  const kind = (name: string): ExpressionSpecification => ['==', ['get', 'kind'], name]
  return {
    version: 8,
    sources: Object.fromEntries(
      (['land', 'coast', 'density', 'covers', 'rings', 'draft'] as const).map((name) => [
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
        source: 'covers',
        minzoom: COVER_ZOOM_MIN + 1.5,
        filter: kind('cell'),
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
  private readonly data = new Map<SourceName, FeatureCollection>()
  private readonly dirty = new Set<SourceName>()
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
    this.map.on('click', (event) => {
      if (this.placing) this.handlers.pin({ lat: event.lngLat.lat, lng: event.lngLat.wrap().lng })
    })
    this.map.on('error', ({ error }) => console.warn('map:', error.message))
    this.map.on('moveend', () => this.declutter())
    onTheme(() => void this.dress())
    void this.drawLand()
  }

  // --- what is shown ---------------------------------------------------------------------------------------------

  setDensity(density: DensityMap): void {
    const features = density.cells.map(([cell, phones]) => polygon(cellRing(cell), { level: Math.log10(phones), phones }))
    this.put('density', collection(features))
    this.container.dataset['cells'] = String(features.length)
  }

  /** Coverage of phones under the pointer, for the legend's line. */
  onHover(listener: (words: string) => void): void {
    this.map.on('mousemove', 'density', ({ features }) => listener(t('map.hover', { n: count(Number(features?.[0]?.properties['phones'] ?? 0)) })))
    this.map.on('mouseleave', 'density', () => listener(''))
  }

  setAlerts(alerts: ViewAlert[]): void {
    const kept = new Set(alerts.map(({ id }) => id))
    for (const [id, { marker }] of this.shown) {
      if (!kept.has(id)) {
        marker.remove()
        this.shown.delete(id)
        this.covers.delete(id)
        this.put('covers', null)
      }
    }
    for (const alert of alerts) {
      const known = this.shown.get(alert.id)
      if (known === undefined) this.shown.set(alert.id, this.mark(alert))
      else {
        known.alert = alert
        known.marker.setLngLat(alert.location)
      }
    }
    this.tick()
    this.declutter()
    this.put('rings', null)
  }

  setCover(cover: AlertCover): void {
    const alert = this.shown.get(cover.alert_id)?.alert
    if (alert === undefined) return
    const inside = uncompacted(cover.inside, cover.resolution)
    // A shape that goes around a pole cannot be drawn flat as one: its cells can.
    const isPolar = Math.abs(alert.location.lat) + cover.ring_km / 111 > 85
    this.covers.set(cover.alert_id, { cover, inside, area: isPolar || inside.length === 0 ? null : union(inside) })
    this.put('covers', null)
  }

  /** How many cells are inside of an alert's ring, and how many at its edge. */
  coverOf(id: string): { inside: number; edge: number; resolution: number } | undefined {
    const known = this.covers.get(id)
    return known && { inside: known.inside.length, edge: known.cover.edge.length, resolution: known.cover.resolution }
  }

  select(id: string | null): void {
    if (this.selected === id) return
    this.selected = id
    for (const [other, { button }] of this.shown) button.setAttribute('aria-pressed', String(other === id))
    this.declutter()
    this.put('rings', null)
    this.put('covers', null)
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
    for (const shown of this.shown.values()) {
      const ring = ringOf(shown.alert, nowMs)
      if (ring.km !== shown.ring.km) grew = true
      shown.ring = ring
      setText(shown.label, ring.nextMs === null ? km(ring.km) : `${km(ring.km)} → ${km(ring.nextKm ?? 0)} ${countdown(ring.nextMs - nowMs)}`)
      shown.button.setAttribute('aria-label', `${shown.alert.id} ${shown.label.textContent ?? ''}`)
      shown.button.dataset['ringKm'] = String(ring.km)
    }
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
    this.put('draft', null)
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

  private mark(alert: ViewAlert): Shown {
    const label = h('span', { class: 'mark-label' })
    const button = h(
      'button',
      {
        type: 'button',
        class: `mark ${alert.status}`,
        'data-testid': 'alert-mark',
        'data-alert': alert.id,
        'aria-pressed': String(alert.id === this.selected),
        onclick: (event: MouseEvent) => {
          event.stopPropagation()
          this.handlers.select(alert.id)
        },
      },
      h('span', { class: 'mark-dot' }),
      label,
    )
    const marker = new maplibre.Marker({ element: button, anchor: 'left', offset: [-9, 0] }).setLngLat(alert.location).addTo(this.map)
    const ring = ringOf(alert, this.nowMs())
    return { alert, ring, drawnKm: ring.km, marker, button, label }
  }

  /** A label that would lie over another one, or over another alert's dot, is left out: its dot stays. */
  private declutter(): void {
    const marks = [...this.shown.values()]
      .map((shown) => ({ shown, at: this.map.project(shown.alert.location), isFirst: shown.alert.id === this.selected }))
      .sort((a, b) => Number(b.isFirst) - Number(a.isFirst) || (a.shown.ring.nextMs ?? Infinity) - (b.shown.ring.nextMs ?? Infinity))
    const boxes: [number, number, number][] = []
    const isFree = (x: number, y: number, width: number, own: unknown): boolean =>
      boxes.every(([left, top, right]) => Math.abs(y - top) > MARK_HEIGHT || x > right || x + width < left) &&
      marks.every(({ shown, at }) => shown === own || Math.abs(at.y - y) > MARK_HEIGHT || at.x < x - 8 || at.x > x + width + 8)
    for (const { shown, at, isFirst } of marks) {
      const width = 34 + 7 * (shown.label.textContent ?? '').length
      const isShown = isFirst || isFree(at.x, at.y, width, shown)
      if (isShown) boxes.push([at.x, at.y, at.x + width])
      shown.button.classList.toggle('bare', !isShown)
    }
  }

  private grow(): void {
    if (stillness()) {
      for (const shown of this.shown.values()) shown.drawnKm = shown.ring.km
      this.put('rings', null)
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
      this.put('rings', null)
      if (part < 1) requestAnimationFrame(step)
    }
    requestAnimationFrame(step)
  }

  /** Have a source drawn anew in the next frame; null: made of what is known by then. */
  private put(name: SourceName, data: FeatureCollection | null): void {
    if (data !== null) this.data.set(name, data)
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
      if (source === undefined) continue
      const made = { rings: () => this.ringFeatures(), covers: () => this.coverFeatures(), draft: () => this.draftFeatures() }[name as string]
      source.setData(made === undefined ? (this.data.get(name) ?? NOTHING) : collection(made()))
    }
    this.dirty.clear()
    this.container.dataset['rings'] = [...this.shown.values()].map(({ alert, drawnKm }) => `${alert.id}:${Math.round(drawnKm)}`).join(' ')
  }

  private ringFeatures(): Feature[] {
    return [...this.shown.values()].flatMap(({ alert, ring, drawnKm }) => {
      const { lat, lng } = alert.location
      const about = { id: alert.id, status: alert.status, selected: alert.id === this.selected }
      const drawn = [polygon(circle(lat, lng, drawnKm), { ...about, kind: 'ring' })]
      if (ring.nextKm !== null) drawn.push(polygon(circle(lat, lng, ring.nextKm), { ...about, kind: 'next' }))
      return drawn
    })
  }

  private coverFeatures(): Feature[] {
    return [...this.covers.values()].flatMap(({ cover, inside, area }) => {
      const status = this.shown.get(cover.alert_id)?.alert.status ?? 'actual'
      const isSelected = cover.alert_id === this.selected
      const about = { id: cover.alert_id, status, selected: isSelected }
      const cells = (names: string[], kind: string): Feature[] => names.map((cell) => polygon(cellRing(cell), { ...about, kind }))
      return [
        ...(area === null ? cells(inside, 'inside') : [{ type: 'Feature' as const, properties: { ...about, kind: 'inside' }, geometry: area }]),
        ...(isSelected ? cells(inside, 'cell') : []),
        ...cells(cover.edge, 'edge'),
      ]
    })
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
    const shapes = feature(topology, land)
    const found = collection(shapes.type === 'FeatureCollection' ? shapes.features : [shapes])
    const rings = found.features.flatMap(({ geometry }): Position[][] =>
      geometry.type === 'MultiPolygon' ? geometry.coordinates.flat() : geometry.type === 'Polygon' ? geometry.coordinates : [],
    )
    this.put('land', found)
    this.put('coast', collection([{ type: 'Feature', properties: {}, geometry: coast(rings) }]))
  }

  /** Colours of the theme that is on now. */
  private async dress(): Promise<void> {
    await this.ready
    for (const layer of style().layers) {
      for (const [name, value] of Object.entries(layer.paint ?? {})) {
        if (name.endsWith('-color')) this.map.setPaintProperty(layer.id, name as never, value as never)
      }
    }
  }
}
