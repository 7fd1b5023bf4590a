// Every word on the page, in Chinese and English, by key.

import en from './words/en.json'
import zh from './words/zh.json'

export type Language = 'zh' | 'en'
export type Key = keyof typeof en
type Values = Record<string, string | number>

const WORDS: Record<Language, Record<Key, string>> = { en, zh }
const STORED = 'tuanyuan.language'

function wanted(): Language {
  const stored = localStorage.getItem(STORED)
  if (stored === 'zh' || stored === 'en') return stored
  return navigator.languages.some((tag) => tag.toLowerCase().startsWith('zh')) ? 'zh' : 'en'
}

let language: Language = wanted()
const listeners = new Set<() => void>()

export function currentLanguage(): Language {
  return language
}

export function setLanguage(next: Language): void {
  language = next
  localStorage.setItem(STORED, next)
  applyWords(document.documentElement)
  listeners.forEach((listener) => listener())
}

/** Called after every change of language; for what is not written by `applyWords`. */
export function onLanguage(listener: () => void): void {
  listeners.add(listener)
}

/** The words of a key; {names} in them stand for `values`. */
export function t(key: Key, values: Values = {}): string {
  return WORDS[language][key].replace(/\{(\w+)\}/g, (whole, name: string) => String(values[name] ?? whole))
}

export function isKey(text: string): text is Key {
  return text in en
}

/** The words of a key made at run time; the text itself where there are none. */
export function maybe(prefix: string, text: string): string {
  const key = `${prefix}.${text}`
  return isKey(key) ? t(key) : text
}

/** Write words into every element below that names them: data-t, data-t-label, data-t-placeholder. */
export function applyWords(root: ParentNode): void {
  document.documentElement.lang = language === 'zh' ? 'zh-CN' : 'en'
  document.title = t('title')
  const each = (attribute: string, write: (element: HTMLElement, words: string) => void): void => {
    for (const element of root.querySelectorAll<HTMLElement>(`[${attribute}]`)) {
      const key = element.getAttribute(attribute) ?? ''
      if (isKey(key)) write(element, t(key))
    }
  }
  each('data-t', (element, words) => (element.textContent = words))
  each('data-t-label', (element, words) => {
    element.setAttribute('aria-label', words)
    element.title = words
  })
  each('data-t-placeholder', (element, words) => element.setAttribute('placeholder', words))
}
