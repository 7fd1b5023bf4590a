// Whose key it is. Kept for the tab; for the device only if asked. Never in a cookie, never in the address for long.

const STORED = 'tuanyuan.key'

/** The key of the address's fragment (#key=…), which is taken out of it at once, else the one that was kept. */
export function takeKey(): string | null {
  const match = /^#key=([^&]+)/.exec(location.hash)
  if (match?.[1] !== undefined) {
    const key = decodeURIComponent(match[1]).trim()
    history.replaceState(null, '', location.pathname + location.search)
    localStorage.removeItem(STORED)
    sessionStorage.setItem(STORED, key)
    return key
  }
  return sessionStorage.getItem(STORED) ?? localStorage.getItem(STORED)
}

export function keepKey(key: string, onDevice: boolean): void {
  sessionStorage.setItem(STORED, key)
  if (onDevice) localStorage.setItem(STORED, key)
  else localStorage.removeItem(STORED)
}

export function dropKey(): void {
  sessionStorage.removeItem(STORED)
  localStorage.removeItem(STORED)
}
