// What the gateway's refusals say to people.

import type { Refusal } from './api'
import { maybe, t } from './words'

export function wordsOf(refusal: Refusal): string {
  if (refusal.status === 0) return t('problem.no_answer')
  const known = maybe('problem', refusal.type)
  const head = known === refusal.type ? '' : known
  if (head !== '' && refusal.retryAfterS !== null) return `${head} ${t('problem.retry', { n: refusal.retryAfterS })}`
  return head === '' ? `${refusal.status}: ${refusal.detail}` : `${head} ${refusal.detail}`
}
