// What an officer does on the page: publish, edit, close, a picture. Each is asked once more before it is done.

import { newIdempotencyKey, Refusal, type Api } from './api'
import { askFirst } from './dialog'
import { announce, h } from './dom'
import { AlertForm } from './form'
import { duration, km, moment, phones } from './format'
import type { MapView } from './map'
import { wordsOf } from './problems'
import type { AlertDetails, Outcome, Preview, Receipt } from './types'
import { t, type Key } from './words'

const CATEGORIES: Record<Outcome, string[]> = {
  found: ['rescued_from_trafficking', 'ran_away', 'lost', 'at_a_friends_home', 'drowned', 'other_accident', 'killed', 'false_report_dispute'],
  false_report: ['false_report_dispute'],
  cancelled: [],
}

interface DeskHandlers {
  partners(): string[]
  nowMs(): number
  /** Put the form in the place of the list; null: take it away. */
  show(element: HTMLElement | null): void
  published(id: string): void
}

export class Desk {
  private form: AlertForm | null = null
  private sent: { body: string; key: string } | null = null
  private previewed: { body: string; preview: Preview } | null = null

  constructor(
    private readonly api: Api,
    private readonly map: MapView | null,
    private readonly handlers: DeskHandlers,
  ) {}

  isOpen(): boolean {
    return this.form !== null
  }

  /** The pin was put, or moved, on the map. */
  pin(location: { lat: number; lng: number }): void {
    this.form?.setLocation(location)
  }

  leave(): void {
    this.form = null
    this.map?.setDraft(null)
    this.map?.place(false)
    this.handlers.show(null)
  }

  private redraw(): void {
    this.map?.setDraft(this.form?.draft(this.handlers.nowMs()) ?? null)
  }

  private open(form: AlertForm, title: Key, submit: Key, act: () => void, more: HTMLElement[]): void {
    this.form = form
    const element = h(
      'form',
      {
        class: 'desk',
        novalidate: true,
        'data-testid': 'desk-form',
        onsubmit: (event: SubmitEvent) => {
          event.preventDefault()
          if (form.check()) act()
        },
        onkeydown: (event: KeyboardEvent) => {
          if (event.key === 'Escape') this.leave()
        },
      },
      h('header', { class: 'bar' }, h('h2', { t: title }), h('button', { type: 'button', class: 'quiet', t: 'desk.back', 'data-testid': 'desk-back', onclick: () => this.leave() })),
      form.element,
      ...more,
      h('div', { class: 'actions' }, h('button', { type: 'submit', class: 'primary', t: submit, 'data-testid': 'desk-submit' })),
    )
    this.handlers.show(element)
    this.map?.place(true)
    this.redraw()
    form.focus()
  }

  // --- publishing --------------------------------------------------------------------------------------------------

  publish(): void {
    const counted = h('div', { 'aria-live': 'polite', 'data-testid': 'preview' })
    const form = new AlertForm('new', this.handlers.partners(), () => this.redraw(), this.handlers.nowMs())
    const look = h('button', {
      type: 'button',
      t: 'desk.preview',
      'data-testid': 'desk-preview',
      onclick: () => {
        if (form.check()) void this.preview(form, counted)
      },
    })
    const discard = h('button', {
      type: 'button',
      class: 'quiet',
      t: 'desk.discard',
      onclick: () => {
        AlertForm.dropDraft()
        this.leave()
      },
    })
    this.open(form, 'desk.new', 'desk.publish', () => this.confirmPublication(form), [counted, h('div', { class: 'actions' }, discard, look)])
  }

  /** Write how many phones there are in each ring; raises nothing. */
  private async preview(form: AlertForm, place: HTMLElement): Promise<void> {
    const asked = form.preview()
    const body = JSON.stringify(asked)
    if (this.previewed?.body === body) {
      place.replaceChildren(previewTable(this.previewed.preview, this.handlers.nowMs()))
      return
    }
    place.replaceChildren(h('p', { class: 'muted', t: 'preview.counting' }))
    try {
      const preview = await this.api.ask<Preview>('/v1/alerts:preview', { method: 'POST', json: asked })
      this.previewed = { body, preview }
      place.replaceChildren(previewTable(preview, this.handlers.nowMs()))
    } catch (refusal) {
      if (!(refusal instanceof Refusal)) throw refusal
      place.replaceChildren(h('p', { class: 'problem' }, t('preview.unknown'), ' ', wordsOf(refusal)))
      if (refusal.errors.length > 0) form.showFaults(refusal.errors, wordsOf(refusal))
    }
  }

  private confirmPublication(form: AlertForm): void {
    const body = form.publication()
    const counted = h('div', { 'aria-live': 'polite', 'data-testid': 'confirm-preview' })
    const isExercise = body['status'] === 'exercise'
    const { enable } = askFirst({
      id: 'confirm-publish',
      title: isExercise ? 'publish.title.exercise' : 'publish.title',
      confirm: 'publish.yes',
      body: [h('p', { t: isExercise ? 'publish.words.exercise' : 'publish.words' }), counted],
      act: async () => {
        const text = JSON.stringify(body)
        if (this.sent?.body !== text) this.sent = { body: text, key: newIdempotencyKey() }
        const receipt = await this.send('/v1/alerts', 'POST', body, form, { 'Idempotency-Key': this.sent.key })
        this.sent = null
        this.previewed = null
        AlertForm.dropDraft()
        announce(t(receipt.copied ? 'published' : 'published.later', { id: receipt.alert_id }))
        this.leave()
        this.handlers.published(receipt.alert_id)
      },
    })
    enable(false)
    void this.preview(form, counted).finally(() => enable(true))
  }

  /** Raises an Error with words for people; what is wrong with a field stands beside it. */
  private async send(path: string, method: string, json: unknown, form: AlertForm | null, headers: Record<string, string> = {}): Promise<Receipt> {
    try {
      return await this.api.ask<Receipt>(path, { method, json, headers })
    } catch (refusal) {
      if (!(refusal instanceof Refusal)) throw refusal
      // A proxy's 502 or 504 has no type of ours.
      const isUnknown = refusal.status === 0 || refusal.type === 'server-away' || (refusal.status >= 502 && refusal.type === '')
      const words = isUnknown ? t('problem.unknown_whether') : wordsOf(refusal)
      if (!isUnknown) form?.showFaults(refusal.errors, words)
      throw new Error(words)
    }
  }

  // --- an alert that is open ---------------------------------------------------------------------------------------

  edit(details: AlertDetails): void {
    const path = `/v1/alerts/${encodeURIComponent(details.alert_id)}`
    const form = new AlertForm('edit', this.handlers.partners(), () => this.redraw(), this.handlers.nowMs())
    form.fill(details)
    const key = { body: '', key: '' }
    this.open(
      form,
      'desk.edit',
      'desk.save',
      () => {
        const changes = form.changes()
        if (Object.keys(changes).length === 0) {
          form.showFaults([], t('edit.nothing'))
          return
        }
        askFirst({
          id: 'confirm-edit',
          title: 'edit.title',
          confirm: 'edit.yes',
          body: [h('p', { t: 'edit.words' })],
          act: async () => {
            const body = JSON.stringify(changes)
            if (key.body !== body) Object.assign(key, { body, key: newIdempotencyKey() })
            const receipt = await this.send(path, 'PATCH', changes, form, { 'If-Match': `"${details.revision}"`, 'Idempotency-Key': key.key })
            announce(t('edited', { id: receipt.alert_id }))
            this.leave()
            this.handlers.published(receipt.alert_id)
          },
        })
      },
      [],
    )
  }

  close(details: AlertDetails): void {
    const categories = h('select', { id: 'close-category', 'data-testid': 'close-category' })
    const fill = (outcome: Outcome): void => {
      categories.replaceChildren(
        h('option', { value: '', t: 'close.category.none' }),
        ...CATEGORIES[outcome].map((name) => h('option', { value: name, t: `category.${name}` as Key })),
      )
    }
    const outcomes = (Object.keys(CATEGORIES) as Outcome[]).map((outcome) =>
      h(
        'label',
        { class: 'check' },
        h('input', { type: 'radio', name: 'outcome', value: outcome, checked: outcome === 'found', required: true, 'data-testid': `outcome-${outcome}`, onchange: () => fill(outcome) }),
        ' ',
        h('span', { t: `outcome.${outcome}` as Key }),
      ),
    )
    fill('found')
    const chosen = (): string => outcomes.map((label) => label.querySelector('input')).find((input) => input?.checked)?.value ?? 'found'
    askFirst({
      id: 'confirm-close',
      title: 'close.title',
      confirm: 'close.yes',
      body: [
        h('p', { t: 'close.words' }),
        h('fieldset', {}, h('legend', { t: 'close.outcome' }), ...outcomes),
        h('div', { class: 'field' }, h('label', { for: 'close-category', t: 'close.category' }), categories, h('p', { class: 'hint', t: 'close.category.hint' })),
      ],
      act: async () => {
        const body = { outcome: chosen(), ...(categories.value === '' ? {} : { category: categories.value }) }
        const receipt = await this.send(`/v1/alerts/${encodeURIComponent(details.alert_id)}/close`, 'POST', body, null)
        announce(t('closed', { id: receipt.alert_id }))
      },
    })
  }

  async photo(id: string, picture: Blob): Promise<string> {
    try {
      await this.api.ask(`/v1/alerts/${encodeURIComponent(id)}/photo`, { method: 'PUT', body: picture })
      return ''
    } catch (refusal) {
      if (refusal instanceof Refusal) return wordsOf(refusal)
      throw refusal
    }
  }
}

function previewTable(preview: Preview, nowMs: number): HTMLElement {
  return h(
    'div',
    {},
    h(
      'table',
      { class: 'preview' },
      h('caption', { t: 'preview.title' }),
      h('thead', {}, h('tr', {}, h('th', { scope: 'col', t: 'preview.at' }), h('th', { scope: 'col', t: 'preview.ring' }), h('th', { scope: 'col', t: 'preview.phones' }))),
      h(
        'tbody',
        {},
        ...preview.steps.map(({ at, ring_km, phones: number }, index) =>
          h('tr', { 'data-testid': 'preview-step' }, h('td', {}, index === 0 ? t('preview.now') : moment(Date.parse(at), nowMs)), h('td', {}, km(ring_km)), h('td', { class: 'number' }, phones(number))),
        ),
      ),
    ),
    h('p', { class: 'hint' }, t('preview.about', { age: duration(1000 * preview.counts_age_s), left: preview.previews_left })),
  )
}
