// The desk's form: an alert to publish, or changes of one that is open. What is typed outlives a loss of the server,
// and a reload of the tab.

import type { Fault } from './api'
import { h, newId } from './dom'
import { fromLocalInput, toLocalInput } from './format'
import type { Draft } from './map'
import type { AlertDetails, Place, Schedule } from './types'
import { t, type Key } from './words'

type Control = HTMLInputElement | HTMLSelectElement | HTMLTextAreaElement
const STORED = 'tuanyuan.draft'
const DEFAULT_SCHEDULE: Schedule = [
  [1, 100],
  [2, 200],
  [3, 300],
  [null, 500],
]

interface Field {
  control: Control
  problem: HTMLElement
  row: HTMLElement
}

/** The names of fields are the members of the request, with dots. */
export class AlertForm {
  readonly element: HTMLElement
  private readonly fields = new Map<string, Field>()
  private readonly steps = h('div', { class: 'steps', 'data-testid': 'schedule-steps' })
  private readonly own = h('input', { type: 'checkbox', 'data-testid': 'own-schedule' })
  private readonly stepsProblem = h('p', { class: 'problem', hidden: true })
  private readonly audience = h('div', { class: 'checks' })
  private readonly audienceProblem = h('p', { class: 'problem', hidden: true })
  private readonly summary = h('p', { class: 'problem', role: 'alert', hidden: true, 'data-testid': 'form-problem' })
  private before: Record<string, unknown> | null = null

  constructor(
    private readonly kind: 'new' | 'edit',
    partners: string[],
    private readonly changed: () => void,
    nowMs: number,
  ) {
    const number = { inputmode: 'decimal', autocomplete: 'off' }
    const place = h(
      'fieldset',
      {},
      h('legend', { t: 'desk.where' }),
      h('div', { class: 'pair' }, this.input('location.lat', 'desk.lat', { ...number, placeholder: 'desk.lat.example' }), this.input('location.lng', 'desk.lng', { ...number, placeholder: 'desk.lng.example' })),
      h('p', { class: 'hint', t: 'desk.pin.hint' }),
      this.input('place', 'desk.place', { maxlength: 200, autocomplete: 'off' }),
      this.input('missing_since', 'desk.missing_since', { type: 'datetime-local', value: toLocalInput(nowMs), max: toLocalInput(nowMs + 60_000) }),
    )
    const child = h(
      'fieldset',
      {},
      h('legend', { t: 'desk.child' }),
      this.input('child.name', 'desk.name', { maxlength: 60, autocomplete: 'off' }),
      h(
        'div',
        { class: 'pair' },
        this.choice('child.sex', 'desk.sex', [
          ['unknown', 'sex.unknown'],
          ['female', 'sex.female'],
          ['male', 'sex.male'],
        ]),
        this.input('child.age', 'desk.age', { inputmode: 'numeric', maxlength: 2, autocomplete: 'off' }),
      ),
      this.input('child.clothes', 'desk.clothes', { maxlength: 300, autocomplete: 'off' }),
      this.input('child.features', 'desk.features', { maxlength: 500, autocomplete: 'off' }),
      this.field('text', 'desk.text', h('textarea', { rows: 3, maxlength: 2000 })),
      this.input('contact', 'desk.contact', { maxlength: 100, value: '110', autocomplete: 'off' }),
    )
    this.own.addEventListener('change', () => {
      this.steps.hidden = !this.own.checked
      this.touch()
    })
    this.setSteps(DEFAULT_SCHEDULE)
    this.steps.hidden = true
    for (const partner of partners) {
      this.audience.append(h('label', {}, h('input', { type: 'checkbox', name: 'audience', value: partner, onchange: () => this.touch() }), ` ${partner}`))
    }
    const more = h(
      'details',
      { class: 'more' },
      h('summary', { t: 'desk.more' }),
      this.kind === 'new'
        ? this.choice('status', 'desk.status', [
            ['actual', 'status.actual'],
            ['exercise', 'status.exercise'],
          ])
        : null,
      h('div', { class: 'field', role: 'group', label: 'desk.audience' }, h('span', { class: 'label', t: 'desk.audience' }), this.audience, this.audienceProblem),
      this.input('headline', 'desk.headline', { maxlength: 160, autocomplete: 'off' }),
      this.input('expires_at', 'desk.expires_at', { type: 'datetime-local' }),
      this.kind === 'new' ? this.input('division', 'desk.division', { inputmode: 'numeric', maxlength: 6, autocomplete: 'off' }) : null,
      h('label', { class: 'check' }, this.own, ' ', h('span', { t: 'desk.own_schedule' })),
      this.steps,
      this.stepsProblem,
    )
    this.element = h('div', { class: 'form' }, this.summary, place, child, more)
    this.element.addEventListener('input', () => this.touch())
    if (kind === 'new') this.restore()
  }

  // --- fields ----------------------------------------------------------------------------------------------------

  private field(name: string, label: Key, control: Control): HTMLElement {
    const id = newId('field')
    const problem = h('p', { class: 'problem', id: `${id}-problem`, hidden: true })
    control.id = id
    control.dataset['testid'] = `field-${name}`
    control.setAttribute('aria-describedby', `${id}-problem`)
    const row = h('div', { class: 'field' }, h('label', { for: id, t: label }), control, problem)
    this.fields.set(name, { control, problem, row })
    return row
  }

  private input(name: string, label: Key, attributes: Record<string, string | number>): HTMLElement {
    return this.field(name, label, h('input', { type: 'text', ...attributes } as Parameters<typeof h>[1]) as HTMLInputElement)
  }

  private choice(name: string, label: Key, options: [string, Key][]): HTMLElement {
    return this.field(name, label, h('select', {}, ...options.map(([value, key]) => h('option', { value, t: key }))))
  }

  private value(name: string): string {
    return this.fields.get(name)?.control.value.trim() ?? ''
  }

  private set(name: string, value: string): void {
    const field = this.fields.get(name)
    if (field !== undefined) field.control.value = value
  }

  private setSteps(schedule: Schedule): void {
    const step = (hours: number | null, radius: number | null, isLast: boolean): HTMLElement =>
      h(
        'div',
        { class: 'step' },
        isLast
          ? h('span', { class: 'hours', t: 'desk.step.last' })
          : h('label', { class: 'hours' }, h('span', { t: 'desk.step.until' }), h('input', { inputmode: 'decimal', value: hours ?? '', class: 'step-hours', label: 'desk.step.hours' }), ' h'),
        h('label', {}, h('input', { inputmode: 'decimal', value: radius ?? '', class: 'step-km', label: 'desk.step.km' }), ' km'),
        isLast
          ? null
          : h('button', { type: 'button', class: 'quiet', label: 'desk.step.remove', onclick: (event: MouseEvent) => {
              ;(event.currentTarget as HTMLElement).closest('.step')?.remove()
              this.touch()
            } }, '×'),
      )
    const rows = schedule.map(([hours, radius], index) => step(hours, radius, index === schedule.length - 1))
    const add = h('button', { type: 'button', class: 'quiet', t: 'desk.step.add', onclick: () => {
      this.steps.insertBefore(step(null, null, false), this.steps.querySelector('.step:last-of-type'))
      this.touch()
    } })
    this.steps.replaceChildren(...rows, add)
  }

  private schedule(): Schedule | null {
    if (!this.own.checked) return null
    return [...this.steps.querySelectorAll('.step')].map((row) => {
      const hours = row.querySelector<HTMLInputElement>('.step-hours')
      const radius = row.querySelector<HTMLInputElement>('.step-km')
      return [hours === null ? null : numberOf(hours.value), numberOf(radius?.value ?? '')]
    })
  }

  private partners(): string[] | null {
    const chosen = [...this.audience.querySelectorAll<HTMLInputElement>('input:checked')].map(({ value }) => value)
    return chosen.length === 0 ? null : chosen
  }

  private touch(): void {
    if (this.kind === 'new') sessionStorage.setItem(STORED, JSON.stringify(this.raw()))
    this.changed()
  }

  private raw(): Record<string, unknown> {
    const values = Object.fromEntries([...this.fields].map(([name, { control }]) => [name, control.value]))
    return { ...values, own: this.own.checked, schedule: this.own.checked ? this.schedule() : null, audience: this.partners() }
  }

  private restore(): void {
    const stored = sessionStorage.getItem(STORED)
    if (stored === null) return
    const { own, schedule, audience, ...values } = JSON.parse(stored) as Record<string, unknown>
    for (const [name, value] of Object.entries(values)) this.set(name, String(value))
    if (own === true && Array.isArray(schedule)) {
      this.own.checked = true
      this.steps.hidden = false
      this.setSteps(schedule as Schedule)
    }
    this.setAudience(audience as string[] | null)
  }

  private setAudience(audience: string[] | null): void {
    for (const box of this.audience.querySelectorAll<HTMLInputElement>('input')) box.checked = audience?.includes(box.value) ?? false
  }

  // --- what it says ----------------------------------------------------------------------------------------------

  static dropDraft(): void {
    sessionStorage.removeItem(STORED)
  }

  setLocation({ lat, lng }: Place): void {
    this.set('location.lat', lat.toFixed(5))
    this.set('location.lng', lng.toFixed(5))
    this.show('location.lat', '')
    this.show('location.lng', '')
    this.touch()
  }

  fill(details: AlertDetails): void {
    const { child } = details
    const values: Record<string, string> = {
      'location.lat': String(details.location.lat),
      'location.lng': String(details.location.lng),
      place: details.place,
      missing_since: toLocalInput(Date.parse(details.missing_since)),
      'child.name': child?.name ?? '',
      'child.sex': child?.sex ?? 'unknown',
      'child.age': child?.age === null || child === null ? '' : String(child.age),
      'child.clothes': child?.clothes ?? '',
      'child.features': child?.features ?? '',
      text: details.text,
      contact: details.contact,
      headline: details.headline,
      expires_at: toLocalInput(Date.parse(details.expires_at)),
    }
    for (const [name, value] of Object.entries(values)) this.set(name, value)
    const isOwn = JSON.stringify(details.schedule) !== JSON.stringify(DEFAULT_SCHEDULE)
    this.own.checked = isOwn
    this.steps.hidden = !isOwn
    this.setSteps(details.schedule)
    this.setAudience(details.audience)
    this.before = this.body()
  }

  /** What a map shows of it; null without a place. */
  draft(nowMs: number): Draft | null {
    const [lat, lng] = [numberOf(this.value('location.lat')), numberOf(this.value('location.lng'))]
    if (!isWithin(lat, 90) || !isWithin(lng, 180)) return null
    const since = Date.parse(fromLocalInput(this.value('missing_since')))
    const schedule = this.schedule() ?? DEFAULT_SCHEDULE
    return { location: { lat, lng }, schedule: schedule.filter(([, radius]) => radius > 0 && radius <= 1000), missingSinceMs: Number.isNaN(since) ? nowMs : since }
  }

  /** The request's members, of which an edit keeps those that changed. */
  private body(): Record<string, unknown> {
    const age = this.value('child.age')
    const expires = this.value('expires_at')
    return {
      location: { lat: numberOf(this.value('location.lat')), lng: numberOf(this.value('location.lng')) },
      missing_since: fromLocalInput(this.value('missing_since')),
      schedule: this.schedule(),
      expires_at: expires === '' ? null : fromLocalInput(expires),
      audience: this.partners(),
      child: {
        name: this.value('child.name'),
        sex: this.value('child.sex'),
        age: age === '' ? null : numberOf(age),
        clothes: this.value('child.clothes'),
        features: this.value('child.features'),
      },
      headline: this.value('headline'),
      place: this.value('place'),
      text: this.value('text'),
      contact: this.value('contact') || null,
    }
  }

  publication(): Record<string, unknown> {
    const division = this.value('division')
    const { contact, ...body } = this.body()
    return { ...body, ...(contact === null ? {} : { contact }), status: this.value('status'), ...(division === '' ? {} : { division }) }
  }

  preview(): Record<string, unknown> {
    const { location, missing_since, schedule, audience } = this.body()
    return { location, missing_since, schedule, audience }
  }

  /** Empty: nothing has changed. */
  changes(): Record<string, unknown> {
    const before = this.before ?? {}
    return Object.fromEntries(Object.entries(this.body()).filter(([name, value]) => JSON.stringify(value) !== JSON.stringify(before[name])))
  }

  // --- what is wrong with it ---------------------------------------------------------------------------------------

  private show(name: string, words: string): void {
    const field = this.fields.get(name)
    if (field === undefined) return
    field.problem.textContent = words
    field.problem.hidden = words === ''
    field.control.setAttribute('aria-invalid', String(words !== ''))
    if (words !== '') field.row.closest('details')?.setAttribute('open', '')
  }

  private clear(): void {
    for (const name of this.fields.keys()) this.show(name, '')
    for (const place of [this.summary, this.stepsProblem, this.audienceProblem]) place.hidden = true
  }

  private tell(place: HTMLElement, words: string): void {
    place.textContent = words
    place.hidden = false
    place.closest('details')?.setAttribute('open', '')
  }

  private focusFirst(): void {
    this.element.querySelector<HTMLElement>('[aria-invalid="true"]')?.focus()
  }

  /** What can be seen without asking; whether it is well. */
  check(): boolean {
    this.clear()
    const problems: [string, Key][] = []
    if (!isWithin(numberOf(this.value('location.lat')), 90)) problems.push(['location.lat', 'check.lat'])
    if (!isWithin(numberOf(this.value('location.lng')), 180)) problems.push(['location.lng', 'check.lng'])
    if (this.value('missing_since') === '') problems.push(['missing_since', 'check.missing_since'])
    const age = this.value('child.age')
    if (age !== '' && !/^(\d|1[0-7])$/.test(age)) problems.push(['child.age', 'check.age'])
    if (this.kind === 'new' && !['child.name', 'child.clothes', 'child.features', 'headline', 'text'].some((name) => this.value(name) !== '')) {
      problems.push(['child.name', 'check.says_something'])
    }
    for (const [name, key] of problems) this.show(name, t(key))
    let isWell = problems.length === 0
    if (this.kind === 'new' && this.value('status') === 'exercise' && this.partners() === null) {
      this.tell(this.audienceProblem, t('check.audience'))
      isWell = false
    }
    const schedule = this.schedule()
    if (schedule !== null && !rises(schedule)) {
      this.tell(this.stepsProblem, t('check.schedule'))
      isWell = false
    }
    this.focusFirst()
    return isWell
  }

  /** What the desk says is wrong, beside the fields it means. */
  showFaults(faults: Fault[], otherwise: string): void {
    this.clear()
    const rest: string[] = []
    for (const { where, expected } of faults) {
      const name = where.split('/').slice(2).join('.')
      if (this.fields.has(name)) this.show(name, expected)
      else if (name.startsWith('schedule')) this.tell(this.stepsProblem, expected)
      else if (name.startsWith('audience')) this.tell(this.audienceProblem, expected)
      else rest.push(expected)
    }
    if (faults.length === 0) rest.push(otherwise)
    if (rest.length > 0) this.tell(this.summary, rest.join(' '))
    this.focusFirst()
  }

  focus(): void {
    this.fields.get('location.lat')?.control.focus()
  }
}

/** NaN for what is no number, an empty text among it. */
function numberOf(text: string): number {
  return text.trim() === '' ? NaN : Number(text.trim().replace(/°$/, ''))
}

function isWithin(value: number, most: number): boolean {
  return Math.abs(value) <= most
}

function rises(schedule: Schedule): boolean {
  return schedule.every(([hours, radius], index) => {
    const before = schedule[index - 1]
    const isLast = index === schedule.length - 1
    const hoursRise = isLast ? hours === null : hours !== null && hours > (before?.[0] ?? 0)
    return hoursRise && radius > (before?.[1] ?? 0) && radius <= 1000
  })
}
