// What the gateway sends; gateway/view_models.py and gateway/alert_models.py describe it.

export type Role = 'operator' | 'officer'

export interface Hello {
  version: string
  server_time_ms: number
  step_s: number
  scope: string
  role: Role
  name: string
}

export interface Alarm {
  kind: string
  source: string
  words: string
}

export interface FiguresEvent {
  at_ms: number
  figures: Record<string, number>
  alarms: Alarm[]
}

export interface Place {
  lat: number
  lng: number
}

/** [hours since the child went missing, km]; the last hours is null. */
export type Schedule = [number | null, number][]

export interface ViewAlert {
  id: string
  revision: number
  status: 'actual' | 'exercise'
  state: 'open' | 'expired'
  location: Place
  missing_since: string
  published_at: string
  schedule: Schedule
  ring_km: number
  next_growth_ms: number | null
  next_ring_km: number | null
  expires_at: string
  audience: string[] | null
  told: number | null
  delivered: number | null
  acknowledged: number | null
  retracted: number | null
}

export interface AlertsEvent {
  at_ms: number
  alerts: ViewAlert[]
}

export interface MapEvent {
  at_ms: number | null
}

export interface DensityMap {
  at_ms: number | null
  resolution: number
  cells: [string, number][]
  shards_missing: number[]
}

export interface CoverCells {
  ring_km: number
  inside: string[]
  edge: string[]
}

export interface AlertCover extends CoverCells {
  alert_id: string
  revision: number
  resolution: number
  next: (CoverCells & { at_ms: number }) | null
}

export interface ToldOverTime {
  at_ms: number[]
  told: (number | null)[]
  resolved: (number | null)[]
}

export interface History {
  step_s: number
  at_ms: number[]
  series: Record<string, (number | null)[]>
}

export type Outcome = 'found' | 'false_report' | 'cancelled'
export type Sex = 'female' | 'male' | 'unknown'
export type PhoneCount = number | '<20'

export interface Child {
  name: string
  sex: Sex
  age: number | null
  clothes: string
  features: string
}

export interface PartnerFigures {
  partner: string
  told: PhoneCount
  retracted: PhoneCount
  delivered: PhoneCount | null
  acknowledged: PhoneCount | null
}

export interface AlertDetails {
  alert_id: string
  revision: number
  state: 'open' | 'expired' | 'closed'
  status: 'actual' | 'exercise'
  division: string | null
  published_by: string | null
  location: Place
  missing_since: string
  schedule: Schedule
  expires_at: string
  audience: string[] | null
  child: Child | null
  headline: string
  place: string
  text: string
  contact: string
  photo_url: string | null
  url: string
  partners: PartnerFigures[] | null
}

export interface Preview {
  steps: { at: string; ring_km: number; phones: PhoneCount }[]
  counted_at: string
  counts_age_s: number
  previews_left: number
}

export interface Receipt {
  alert_id: string
  event: string
  revision: number
  at: string
  url: string
  copied: boolean
}
