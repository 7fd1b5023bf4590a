// The marks of open alerts: a dot each, and a label beside it where there is room. Drawn on one canvas over the map's,
// in the frame in which the map is drawn: an element for each would be laid out anew whenever the map moves. Whoever
// has no pointer takes the list of open alerts, which leads to the same panels.

import type { LngLat, Map as MapLibreMap } from 'maplibre-gl'
import { h } from './dom'
import { colour } from './theme'
import type { Place } from './types'

const HEIGHT = 22
const DOT = 12
/** Around a label, for the line of a selected one. */
const OUTER = 4
const EDGE = 4
const GAP = 2
/** Where a pointer is meant to hit: WCAG 2.2 asks for 24 × 24. */
const TARGET = 24
/** All countdowns change in the same moment; their labels do within some frames. */
const PAINTED_AT_ONCE = 6

export interface Mark {
  id: string
  location: Place
  isExercise: boolean
  text: string
  /** When its ring grows: the sooner, the more its label matters. */
  nextMs: number | null
}

/** Where the label stands: beside the dot; under it, where the map is narrow; nowhere, for want of room. */
type Side = 'right' | 'left' | 'below' | 'bare'

/** A mark as it stands on the map now, in pixels from the upper left corner; x and y are those of its dot. */
export interface DrawnMark {
  id: string
  text: string
  side: Side
  x: number
  y: number
  box: { left: number; top: number; width: number; height: number }
}

interface Placed extends DrawnMark {
  mark: Mark
}

interface Sprite {
  /** What it looks like but for its words. */
  shape: string
  words: string
  canvas: HTMLCanvasElement
}

interface Paint {
  alert: string
  exercise: string
  ground: string
  text: string
  font: string
}

export class Marks {
  private readonly canvas = h('canvas', { class: 'marks', 'aria-hidden': 'true' })
  private readonly context = this.canvas.getContext('2d')
  private readonly sprites = new Map<string, Sprite>()
  private readonly widths = new Map<string, number>()
  private marks: Mark[] = []
  private ordered: Mark[] = []
  private drawn: Placed[] = []
  private selected: string | null = null
  private hovered: string | null = null
  private paint: Paint = { alert: '', exercise: '', ground: '', text: '', font: '' }
  private size = { width: 0, height: 0 }
  private ratio = 0
  private painted = 0
  private asked = 0

  constructor(private readonly map: MapLibreMap) {
    map.getCanvas().after(this.canvas)
    map.on('render', () => this.draw())
    map.on('resize', () => this.measure())
    this.measure()
    this.dress()
  }

  private measure(): void {
    const { clientWidth: width, clientHeight: height } = this.map.getContainer()
    this.size = { width, height }
    this.ask()
  }

  /** Have them drawn; texts, places and order may be others. */
  set(marks: Mark[]): void {
    this.marks = marks
    const kept = new Set(marks.map(({ id }) => id))
    for (const key of this.sprites.keys()) if (!kept.has(key.slice(key.indexOf(':') + 1))) this.sprites.delete(key)
    this.order()
  }

  select(id: string | null): void {
    this.selected = id
    this.order()
  }

  /** Colours of the theme that is on now. */
  dress(): void {
    const wide = matchMedia('(width >= 520px)').matches
    this.paint = { alert: colour('alert'), exercise: colour('exercise'), ground: colour('mark'), text: colour('text'), font: `600 ${wide ? 12 : 11}px ${colour('font')}` }
    this.sprites.clear()
    this.widths.clear()
    this.ask()
  }

  /** What stands there now, the first on top. */
  shown(): DrawnMark[] {
    return this.drawn.map(({ id, text, side, x, y, box }) => ({ id, text, side, x, y, box }))
  }

  /** The alert whose mark is at this place of the map. */
  at(x: number, y: number): string | null {
    const isIn = ({ box }: DrawnMark): boolean => x >= box.left && x <= box.left + box.width && y >= box.top && y <= box.top + box.height
    const isNear = (mark: DrawnMark): boolean => Math.abs(x - mark.x) <= TARGET / 2 && Math.abs(y - mark.y) <= TARGET / 2
    return (this.drawn.find(isIn) ?? this.drawn.find(isNear))?.id ?? null
  }

  /** Whether a mark is under the pointer; it is drawn as such. */
  point(x: number, y: number): boolean {
    const id = this.at(x, y)
    if (id !== this.hovered) {
      this.hovered = id
      this.order()
    }
    return id !== null
  }

  private order(): void {
    const rank = ({ id }: Mark): number => (id === this.selected ? 0 : id === this.hovered ? 1 : 2)
    this.ordered = [...this.marks].sort((a, b) => rank(a) - rank(b) || (a.nextMs ?? Infinity) - (b.nextMs ?? Infinity))
    this.ask()
  }

  /** Drawn in the next frame, by itself: the map under it is not drawn anew for a countdown. */
  private ask(): void {
    if (this.asked !== 0) return
    this.asked = requestAnimationFrame(() => this.draw())
  }

  private draw(): void {
    if (this.asked !== 0) cancelAnimationFrame(this.asked)
    this.asked = 0
    const { context, canvas } = this
    if (context === null) return
    const { width, height } = this.size
    const ratio = window.devicePixelRatio || 1
    if (ratio !== this.ratio) {
      this.ratio = ratio
      this.sprites.clear()
    }
    const [wide, high] = [Math.round(width * ratio), Math.round(height * ratio)]
    if (canvas.width !== wide || canvas.height !== high) {
      canvas.width = wide
      canvas.height = high
    } else context.clearRect(0, 0, wide, high)
    this.drawn = this.place(width, height)
    this.painted = 0
    // The first one last: it lies on top.
    for (let index = this.drawn.length - 1; index >= 0; index -= 1) {
      const placed = this.drawn[index]
      if (placed !== undefined) this.put(context, placed)
    }
  }

  /** Where each of them is, and which labels have room: they lie over no other label and over no other alert's dot. */
  private place(width: number, height: number): Placed[] {
    const centre = this.map.getCenter()
    const places: { mark: Mark; x: number; y: number }[] = []
    for (const mark of this.ordered) {
      const { x, y } = this.map.project(nearest(mark.location, centre))
      if (x > -TARGET && y > -TARGET && x < width + TARGET && y < height + TARGET) places.push({ mark, x, y })
    }
    const taken: DrawnMark['box'][] = []
    const isFree = (box: DrawnMark['box'], own: Mark): boolean =>
      taken.every((other) => apart(box, other)) && places.every(({ mark, x, y }) => mark === own || apart(box, { left: x - 8, top: y - 8, width: 16, height: 16 }))
    return places.map(({ mark, x, y }) => {
      const long = this.widthOf(mark.text)
      const isFirst = mark.id === this.selected || mark.id === this.hovered
      const boxes: [Side, DrawnMark['box']][] = [
        ['right', { left: x - HEIGHT / 2, top: y - HEIGHT / 2, width: long, height: HEIGHT }],
        ['left', { left: x + HEIGHT / 2 - long, top: y - HEIGHT / 2, width: long, height: HEIGHT }],
      ]
      const isInside = (box: DrawnMark['box']): boolean => box.left >= EDGE && box.left + box.width <= width - EDGE
      if (!boxes.some(([, box]) => isInside(box))) {
        const short = long - DOT - 6
        const under = y + HEIGHT / 2 + GAP + HEIGHT > height - EDGE ? y - HEIGHT / 2 - GAP - HEIGHT : y + HEIGHT / 2 + GAP
        boxes.push(['below', { left: Math.max(EDGE, Math.min(width - EDGE - short, x - short / 2)), top: under, width: short, height: HEIGHT }])
      }
      const found = boxes.find(([, box]) => isInside(box) && (isFirst || isFree(box, mark)))
      const [side, box] = found ?? ['bare', { left: x - HEIGHT / 2, top: y - HEIGHT / 2, width: HEIGHT, height: HEIGHT }]
      if (side !== 'bare') taken.push(box)
      return { mark, id: mark.id, text: mark.text, side, x, y, box }
    })
  }

  private widthOf(text: string): number {
    // Digits are of one width: a countdown's text is measured once.
    const shape = text.replace(/\d/g, '0')
    let width = this.widths.get(shape)
    if (width === undefined && this.context !== null) {
      this.context.font = this.paint.font
      width = Math.ceil(this.context.measureText(shape).width) + HEIGHT / 2 + DOT / 2 + 6 + 9
      this.widths.set(shape, width)
    }
    return width ?? 0
  }

  private put(context: CanvasRenderingContext2D, { mark, side, x, y, box }: Placed): void {
    if (side === 'below') this.blit(context, this.sprite('dot', mark, 'bare', HEIGHT), x - HEIGHT / 2, y - HEIGHT / 2)
    this.blit(context, this.sprite('label', mark, side, box.width), box.left, box.top)
  }

  private blit(context: CanvasRenderingContext2D, { canvas }: Sprite, left: number, top: number): void {
    // On whole pixels of the screen, so that words are sharp.
    context.drawImage(canvas, Math.round((left - OUTER) * this.ratio), Math.round((top - OUTER) * this.ratio))
  }

  /** A label's picture: made when its words or its state are others, which is once a second at most. */
  private sprite(part: string, mark: Mark, side: Side, width: number): Sprite {
    const isSelected = mark.id === this.selected
    const isHovered = mark.id === this.hovered
    const shape = `${side} ${width} ${mark.isExercise} ${isSelected} ${isHovered}`
    const words = side === 'bare' ? '' : mark.text
    const name = `${part}:${mark.id}`
    const known = this.sprites.get(name)
    if (known?.shape === shape) {
      if (known.words === words) return known
      if (this.painted >= PAINTED_AT_ONCE) {
        this.ask()
        return known
      }
    }
    this.painted += 1
    const canvas = known?.canvas ?? document.createElement('canvas')
    canvas.width = Math.ceil((width + 2 * OUTER) * this.ratio)
    canvas.height = Math.ceil((HEIGHT + 2 * OUTER) * this.ratio)
    const pen = canvas.getContext('2d')
    if (pen !== null) this.paintLabel(pen, mark, side, width, isSelected, isHovered)
    const made = { shape, words, canvas }
    this.sprites.set(name, made)
    return made
  }

  private paintLabel(pen: CanvasRenderingContext2D, mark: Mark, side: Side, width: number, isSelected: boolean, isHovered: boolean): void {
    const { paint } = this
    const hue = mark.isExercise ? paint.exercise : paint.alert
    const size = side === 'bare' ? HEIGHT - 4 : HEIGHT
    const inset = (HEIGHT - size) / 2
    const outline = (grow: number): void => {
      pen.beginPath()
      pen.roundRect(inset - grow, inset - grow, width - 2 * inset + 2 * grow, size + 2 * grow, size / 2 + grow)
    }
    pen.scale(this.ratio, this.ratio)
    pen.translate(OUTER, OUTER)
    outline(0)
    pen.fillStyle = paint.ground
    pen.fill()
    if (mark.isExercise) pen.setLineDash([4, 2.5])
    outline(-0.75)
    pen.strokeStyle = hue
    pen.lineWidth = 1.5
    pen.stroke()
    pen.setLineDash([])
    if (isSelected || isHovered) {
      outline(1)
      pen.lineWidth = isSelected ? 2 : 1
      pen.stroke()
    }
    if (side !== 'below') {
      pen.beginPath()
      pen.arc(side === 'left' ? width - HEIGHT / 2 : HEIGHT / 2, HEIGHT / 2, DOT / 2, 0, 2 * Math.PI)
      pen.fillStyle = hue
      pen.fill()
    }
    if (side === 'bare') return
    pen.font = paint.font
    pen.textBaseline = 'middle'
    pen.fillStyle = paint.text
    pen.fillText(mark.text, side === 'right' ? HEIGHT / 2 + DOT / 2 + 6 : 9, HEIGHT / 2 + 0.5)
  }
}

/** Of the copies of the world that are seen, the one in the middle. */
function nearest({ lat, lng }: Place, centre: LngLat): [number, number] {
  return [lng + 360 * Math.round((centre.lng - lng) / 360), lat]
}

function apart(a: DrawnMark['box'], b: DrawnMark['box']): boolean {
  return a.left > b.left + b.width + GAP || b.left > a.left + a.width + GAP || a.top >= b.top + b.height + GAP || b.top >= a.top + a.height + GAP
}
