// Elements, without a framework. Nothing here makes HTML out of text, so no text can become markup.

import { t, type Key } from './words'

type Child = Node | string | null | false
type Attributes = Record<string, string | number | boolean | null | undefined | ((event: never) => void)> & {
  /** Key of the element's text, written anew when the language changes. */
  t?: Key
  /** Key of its label. */
  label?: Key
  placeholder?: Key
}

/** An element: `on…` are listeners, true is an empty attribute, false and null are none. */
export function h<K extends keyof HTMLElementTagNameMap>(
  tag: K,
  attributes: Attributes = {},
  ...children: Child[]
): HTMLElementTagNameMap[K] {
  const element = document.createElement(tag)
  for (const [name, value] of Object.entries(attributes)) {
    if (value === null || value === undefined || value === false) continue
    if (typeof value === 'function') element.addEventListener(name.slice(2), value as EventListener)
    else if (name === 't') {
      element.dataset['t'] = String(value)
      element.textContent = t(value as Key)
    } else if (name === 'label') {
      element.dataset['tLabel'] = String(value)
      element.setAttribute('aria-label', t(value as Key))
      element.title = t(value as Key)
    } else if (name === 'placeholder') {
      element.dataset['tPlaceholder'] = String(value)
      element.setAttribute('placeholder', t(value as Key))
    } else element.setAttribute(name, value === true ? '' : String(value))
  }
  element.append(...children.filter((child): child is Node | string => child !== null && child !== false))
  return element
}

/** Change text only where it is another one: nothing is laid out anew for nothing. */
export function setText(element: HTMLElement, text: string): void {
  if (element.textContent !== text) element.textContent = text
}

let ids = 0

/** An id that nothing else on the page has. */
export function newId(prefix: string): string {
  ids += 1
  return `${prefix}-${ids}`
}

const live = { polite: h('div', { class: 'unseen', 'aria-live': 'polite' }), assertive: h('div', { class: 'unseen', role: 'alert' }) }

/** Where announcements are put; once, when the page is made. */
export function announcers(): HTMLElement[] {
  return [live.polite, live.assertive]
}

/** Have screen readers say something. */
export function announce(words: string, urgent = false): void {
  const place = urgent ? live.assertive : live.polite
  place.append(h('p', {}, words))
  while (place.childElementCount > 5) place.firstElementChild?.remove()
}
