// Questions to the gateway, with the key in a header. What it refuses is a Refusal: problem details (RFC 9457).

export interface Fault {
  where: string
  expected: string
  got: string
}

export class Refusal extends Error {
  constructor(
    /** 0: no answer came. */
    readonly status: number,
    readonly type: string,
    readonly detail: string,
    readonly errors: Fault[] = [],
    readonly retryAfterS: number | null = null,
  ) {
    super(detail)
  }

  static async of(answer: Response): Promise<Refusal> {
    const wait = Number(answer.headers.get('Retry-After') ?? NaN)
    const retryAfterS = Number.isFinite(wait) ? wait : null
    try {
      const body = (await answer.json()) as { type?: string; detail?: string; errors?: Fault[] }
      const type = (body.type ?? '').replace('urn:tuanyuan:problem:', '')
      return new Refusal(answer.status, type, body.detail ?? answer.statusText, body.errors ?? [], retryAfterS)
    } catch {
      return new Refusal(answer.status, '', answer.statusText, [], retryAfterS)
    }
  }
}

const ANSWER_WITHIN_MS = 20_000

export class Api {
  constructor(private readonly key: string) {}

  headers(): Record<string, string> {
    return { Authorization: `Bearer ${this.key}` }
  }

  /** Raises Refusal. */
  async ask<T>(path: string, options: { method?: string; json?: unknown; body?: Blob; headers?: Record<string, string> } = {}): Promise<T> {
    const headers: Record<string, string> = { ...this.headers(), ...options.headers }
    let body: BodyInit | null = options.body ?? null
    if (options.json !== undefined) {
      headers['Content-Type'] = 'application/json'
      body = JSON.stringify(options.json)
    } else if (options.body !== undefined) headers['Content-Type'] = options.body.type
    let answer: Response
    try {
      answer = await fetch(path, { method: options.method ?? 'GET', headers, body, cache: 'no-store', signal: AbortSignal.timeout(ANSWER_WITHIN_MS) })
    } catch {
      throw new Refusal(0, 'no-answer', '')
    }
    if (!answer.ok) throw await Refusal.of(answer)
    try {
      return (await answer.json()) as T
    } catch {
      throw new Refusal(0, 'no-answer', '')
    }
  }
}

/** A key for a request that may be sent twice; also where `crypto.randomUUID` is not to be had (plain http). */
export function newIdempotencyKey(): string {
  return [...crypto.getRandomValues(new Uint8Array(16))].map((byte) => byte.toString(16).padStart(2, '0')).join('')
}
