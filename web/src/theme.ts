// Light and dark: as the system says, until somebody chooses. Colours stand in style.css alone.

export type Theme = 'light' | 'dark'

const STORED = 'tuanyuan.theme'
const system = matchMedia('(prefers-color-scheme: light)')
const listeners = new Set<() => void>()

export function currentTheme(): Theme {
  const stored = localStorage.getItem(STORED)
  if (stored === 'light' || stored === 'dark') return stored
  return system.matches ? 'light' : 'dark'
}

function apply(): void {
  document.documentElement.dataset['theme'] = currentTheme()
  listeners.forEach((listener) => listener())
}

export function startTheme(): void {
  system.addEventListener('change', apply)
  apply()
}

export function setTheme(theme: Theme): void {
  localStorage.setItem(STORED, theme)
  apply()
}

export function onTheme(listener: () => void): void {
  listeners.add(listener)
}

/** A colour of the theme that is on: `colour('alert')` is --alert of style.css. */
export function colour(name: string): string {
  return getComputedStyle(document.documentElement).getPropertyValue(`--${name}`).trim()
}

export function stillness(): boolean {
  return matchMedia('(prefers-reduced-motion: reduce)').matches
}
