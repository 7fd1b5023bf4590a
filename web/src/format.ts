// Numbers and times as people read them. All times are Beijing's: one clock for the wall, the desk and the server.

import { currentLanguage, t } from './words'

export const ZONE = 'Asia/Shanghai'
const ZONE_OFFSET_MS = 8 * 3_600_000

function locale(): string {
  return currentLanguage() === 'zh' ? 'zh-CN' : 'en-GB'
}

const formats = new Map<string, Intl.DateTimeFormat | Intl.NumberFormat>()

function dateFormat(options: Intl.DateTimeFormatOptions): Intl.DateTimeFormat {
  const key = locale() + JSON.stringify(options)
  let format = formats.get(key) as Intl.DateTimeFormat | undefined
  if (format === undefined) {
    format = new Intl.DateTimeFormat(locale(), { timeZone: ZONE, hourCycle: 'h23', ...options })
    formats.set(key, format)
  }
  return format
}

export function clock(atMs: number): string {
  return dateFormat({ hour: '2-digit', minute: '2-digit', second: '2-digit' }).format(atMs)
}

export function minute(atMs: number): string {
  return dateFormat({ hour: '2-digit', minute: '2-digit' }).format(atMs)
}

export function day(atMs: number): string {
  return dateFormat({ year: 'numeric', month: 'short', day: 'numeric', weekday: 'short' }).format(atMs)
}

/** Day and minute; the minute alone where the day is today. */
export function moment(atMs: number, nowMs: number): string {
  const sameDay = Math.floor((atMs + ZONE_OFFSET_MS) / 86_400_000) === Math.floor((nowMs + ZONE_OFFSET_MS) / 86_400_000)
  return sameDay ? minute(atMs) : dateFormat({ month: 'numeric', day: 'numeric', hour: '2-digit', minute: '2-digit' }).format(atMs)
}

/** As <input type=datetime-local> has it, and back. */
export function toLocalInput(atMs: number): string {
  return new Date(atMs + ZONE_OFFSET_MS).toISOString().slice(0, 16)
}

/** What the desk is sent: ISO 8601 with Beijing's offset. Empty if there is no time in the field. */
export function fromLocalInput(value: string): string {
  return value === '' ? '' : `${value}+08:00`
}

/** 4:05, 1:04:05; never negative. */
export function countdown(ms: number): string {
  const seconds = Math.max(0, Math.ceil(ms / 1000))
  const [hours, minutes, rest] = [Math.floor(seconds / 3600), Math.floor(seconds / 60) % 60, seconds % 60]
  const two = (value: number): string => String(value).padStart(2, '0')
  return hours > 0 ? `${hours}:${two(minutes)}:${two(rest)}` : `${minutes}:${two(rest)}`
}

/** How long ago, or for how long, in the coarsest unit that says enough. */
export function duration(ms: number): string {
  const seconds = Math.max(0, ms / 1000)
  if (seconds < 1) return `${Math.round(ms)} ms`
  if (seconds < 10) return t('duration.s', { n: seconds.toFixed(1) })
  if (seconds < 120) return t('duration.s', { n: Math.round(seconds) })
  if (seconds < 7200) return t('duration.min', { n: Math.round(seconds / 60) })
  if (seconds < 172_800) return t('duration.h', { n: Math.round(seconds / 3600) })
  return t('duration.d', { n: Math.round(seconds / 86_400) })
}

/** 1,234,567 */
export function count(value: number): string {
  return Math.round(value).toLocaleString('en-US')
}

/** 1.2 M: at most five characters. */
export function short(value: number): string {
  const size = Math.abs(value)
  if (size === 0) return '0'
  if (size < 1) return value.toFixed(2)
  if (size < 10 && !Number.isInteger(value)) return value.toFixed(1)
  if (size < 1000) return String(Math.round(value))
  for (const [limit, unit] of [[1e6, 'k'], [1e9, 'M'], [1e12, 'G']] as const) {
    if (size < limit * 0.9995) {
      const scaled = value / (limit / 1000)
      return `${scaled < 10 ? Number(scaled.toFixed(2)) : scaled < 100 ? Number(scaled.toFixed(1)) : Math.round(scaled)} ${unit}`
    }
  }
  return `${Math.round(value / 1e12)} T`
}

export function bytes(value: number): string {
  let scaled = value
  for (const unit of ['B', 'KiB', 'MiB', 'GiB']) {
    if (Math.abs(scaled) < 1000) return `${scaled < 10 && unit !== 'B' ? scaled.toFixed(1) : Math.round(scaled)} ${unit}`
    scaled /= 1024
  }
  return `${scaled.toFixed(1)} TiB`
}

export function ms(value: number): string {
  return value < 1000 ? `${value < 10 ? Number(value.toFixed(1)) : Math.round(value)} ms` : duration(value)
}

export function km(value: number): string {
  return `${Number(value.toFixed(1))} km`
}

export type Unit = 'count' | 'rate' | 'ms' | 'bytes'

export function quantity(value: number, unit: Unit): string {
  if (unit === 'ms') return ms(value)
  if (unit === 'bytes') return bytes(value)
  return short(value)
}

/** Phones: null is fewer than 20, or not known. */
export function phones(value: number | '<20' | null): string {
  return value === null || value === '<20' ? '< 20' : count(value)
}
