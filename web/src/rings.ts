// Rings by their schedule, as geoindex.rings has them: so many km until so many hours have passed.

import type { Schedule, ViewAlert } from './types'

const HOUR_MS = 3_600_000

export interface RingNow {
  km: number
  /** null: it does not grow any more. */
  nextMs: number | null
  nextKm: number | null
}

export function ringAt(schedule: Schedule, missingSinceMs: number, expiresMs: number, nowMs: number): RingNow {
  const atMs = Math.min(nowMs, expiresMs)
  let step = 0
  const end = (index: number): number => {
    const hours = schedule[index]?.[0] ?? null
    return hours === null ? Infinity : missingSinceMs + Math.round(hours * HOUR_MS)
  }
  while (step < schedule.length - 1 && atMs >= end(step)) step += 1
  const nextMs = end(step)
  const grows = step < schedule.length - 1 && nextMs > nowMs && nextMs <= expiresMs
  return { km: schedule[step]?.[1] ?? 0, nextMs: grows ? nextMs : null, nextKm: grows ? (schedule[step + 1]?.[1] ?? null) : null }
}

export function ringOf(alert: ViewAlert, nowMs: number): RingNow {
  return ringAt(alert.schedule, Date.parse(alert.missing_since), Date.parse(alert.expires_at), nowMs)
}
