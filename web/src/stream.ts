// The gateway's events (SSE), read by fetch, which can send a key. Silence is noticed within 3 s, also after the
// machine slept; the connection is made again by itself, each time a little later, and never by all pages at once.

import { Refusal } from './api'

export type Connection = 'connecting' | 'live' | 'lost'

export interface StreamHandlers {
  event(name: string, data: unknown): void
  /** Called at every change, and when `lost` goes on for another reason. */
  connection(state: Connection): void
  /** The key is not accepted, or is a partner's: nothing more is tried. */
  refused(refusal: Refusal): void
}

const LOST_AFTER_MS = 2_500
const ABANDON_AFTER_MS = 5_000
const LOOK_MS = 250
const SLEPT_MS = 3_000
const RETRY_MS = [300, 600, 1_200, 2_400, 5_000] as const

export class Stream {
  private state: Connection = 'connecting'
  private heardMs = performance.now()
  private bytesMs = performance.now()
  private offsetMs = Date.now() - performance.now()
  private failures = 0
  private abort: AbortController | null = null
  private wake: (() => void) | null = null
  private stopped = false
  private hasAnswered = false
  private readonly timer: number

  constructor(
    private readonly headers: Record<string, string>,
    private readonly handlers: StreamHandlers,
  ) {
    this.timer = window.setInterval(() => this.look(), LOOK_MS)
    document.addEventListener('visibilitychange', this.hurry)
    window.addEventListener('online', this.hurry)
    window.addEventListener('pageshow', this.hurry)
    void this.run()
  }

  /** Whether the gateway is there, whatever it says. */
  isHeard(): boolean {
    return this.abort !== null && performance.now() - this.bytesMs < LOST_AFTER_MS && this.hasAnswered
  }

  stop(): void {
    this.stopped = true
    window.clearInterval(this.timer)
    document.removeEventListener('visibilitychange', this.hurry)
    window.removeEventListener('online', this.hurry)
    window.removeEventListener('pageshow', this.hurry)
    this.abort?.abort()
    this.wake?.()
  }

  private readonly hurry = (): void => {
    if (document.visibilityState !== 'visible') return
    this.look()
    if (this.state !== 'live') {
      this.failures = 0
      this.wake?.()
    }
  }

  private look(): void {
    const now = performance.now()
    const offsetMs = Date.now() - now
    if (offsetMs - this.offsetMs > SLEPT_MS) {
      // The machine slept: a clock stood still. What is shown is old, whatever the connection says.
      this.become('lost')
      this.abort?.abort()
    }
    this.offsetMs = offsetMs
    if (now - this.heardMs > LOST_AFTER_MS) this.become('lost')
    if (this.abort !== null && now - Math.max(this.bytesMs, this.heardMs) > ABANDON_AFTER_MS) this.abort.abort()
  }

  private become(state: Connection): void {
    if (state === this.state) return
    this.state = state
    this.handlers.connection(state)
  }

  private async run(): Promise<void> {
    while (!this.stopped) {
      try {
        await this.listen()
        this.failures += 1
      } catch (problem) {
        if (problem instanceof Refusal && (problem.status === 401 || problem.status === 403)) {
          if (!this.stopped) this.handlers.refused(problem)
          return
        }
        this.failures += 1
        if (problem instanceof Refusal && problem.retryAfterS !== null) await this.pause(1000 * Math.min(10, problem.retryAfterS))
      }
      const base = RETRY_MS[Math.min(this.failures, RETRY_MS.length) - 1] ?? RETRY_MS[0]
      await this.pause(base * (0.5 + Math.random()))
    }
  }

  private async pause(ms: number): Promise<void> {
    if (this.stopped) return
    await new Promise<void>((resolve) => {
      const timer = window.setTimeout(resolve, ms)
      this.wake = () => {
        window.clearTimeout(timer)
        resolve()
      }
    })
    this.wake = null
  }

  private async listen(): Promise<void> {
    const abort = (this.abort = new AbortController())
    this.bytesMs = performance.now()
    this.hasAnswered = false
    try {
      const headers = { ...this.headers, Accept: 'text/event-stream' }
      const answer = await fetch('/v1/view/stream', { headers, cache: 'no-store', signal: abort.signal })
      if (!answer.ok) throw await Refusal.of(answer)
      if (answer.body === null) return
      this.hasAnswered = true
      const reader = answer.body.getReader()
      const decoder = new TextDecoder()
      let rest = ''
      for (;;) {
        const { done, value } = await reader.read()
        if (done) return
        this.bytesMs = performance.now()
        const blocks = (rest + decoder.decode(value, { stream: true })).split('\n\n')
        rest = blocks.pop() ?? ''
        for (const block of blocks) this.take(block)
      }
    } finally {
      if (this.abort === abort) this.abort = null
    }
  }

  private take(block: string): void {
    let name = 'message'
    const data: string[] = []
    for (const line of block.split('\n')) {
      if (line.startsWith('event:')) name = line.slice(6).trim()
      else if (line.startsWith('data:')) data.push(line.slice(5).trim())
    }
    if (data.length === 0 || this.stopped) return
    const parsed: unknown = JSON.parse(data.join('\n'))
    if (name === 'figures') {
      this.heardMs = performance.now()
      this.failures = 0
      this.become('live')
    }
    this.handlers.event(name, parsed)
  }
}
