// Builds the page into gateway/page: index.html, assets under names that hold their hash, each packed once, the
// licences of what is bundled, and the digest of the sources, which a test compares.

import { createHash } from 'node:crypto'
import { existsSync, readFileSync, readdirSync, rmSync, writeFileSync } from 'node:fs'
import { join, relative } from 'node:path'
import { fileURLToPath } from 'node:url'
import { gzipSync } from 'node:zlib'
import { defineConfig } from 'vite'

const root = fileURLToPath(new URL('.', import.meta.url))
const target = join(root, '..', 'gateway', 'page')

/** Every source file, in the order of their names. */
function sources(folder = root) {
  return readdirSync(folder, { withFileTypes: true })
    .filter(({ name }) => name !== 'node_modules')
    .sort((a, b) => (a.name < b.name ? -1 : 1))
    .flatMap((entry) => {
      const path = join(folder, entry.name)
      return entry.isDirectory() ? sources(path) : [path]
    })
}

function digestOfSources() {
  const lines = sources()
    .map((path) => {
      const digest = createHash('sha256').update(readFileSync(path)).digest('hex')
      return `${digest}  ${relative(root, path).replaceAll('\\', '/')}\n`
    })
    .join('')
  return `${createHash('sha256').update(lines).digest('hex')}\n`
}

/** The libraries in the bundle: what package.json asks for, and what those ask for. */
function bundled() {
  const found = new Map()
  const add = (name) => {
    const folder = join(root, 'node_modules', name)
    if (found.has(name) || name.startsWith('@types/') || !existsSync(folder)) return
    const about = JSON.parse(readFileSync(join(folder, 'package.json'), 'utf8'))
    found.set(name, { ...about, folder })
    Object.keys(about.dependencies ?? {}).forEach(add)
  }
  Object.keys(JSON.parse(readFileSync(join(root, 'package.json'), 'utf8')).dependencies).forEach(add)
  return [...found.values()].sort((a, b) => (a.name < b.name ? -1 : 1))
}

function notices() {
  const parts = bundled().map(({ name, version, license, author, folder }) => {
    const file = readdirSync(folder).find((entry) => /^licen[cs]e/i.test(entry))
    const by = typeof author === 'string' ? author : (author?.name ?? '')
    const text = file === undefined ? `(The package holds no text of its licence.) ${by}` : readFileSync(join(folder, file), 'utf8').trim()
    return `${name} ${version}\nLicence: ${license}\n\n${text}\n`
  })
  const head =
    'What is bundled with the page of the operator’s view, and under which licences.\n' +
    'The land is from Natural Earth, which is in the public domain.\n'
  return [head, ...parts].join(`\n${'-'.repeat(80)}\n\n`)
}

const ship = {
  name: 'ship',
  apply: 'build',
  writeBundle() {
    for (const name of readdirSync(join(target, 'assets'))) {
      const path = join(target, 'assets', name)
      writeFileSync(`${path}.gz`, gzipSync(readFileSync(path), { level: 9 }))
      rmSync(path)
    }
    writeFileSync(join(target, 'third-party-notices.txt'), notices())
    writeFileSync(join(target, 'sources.sha256'), digestOfSources())
  },
}

export default defineConfig({
  root,
  base: '/',
  build: {
    outDir: target,
    emptyOutDir: true,
    assetsInlineLimit: 0,
    target: 'es2022',
    modulePreload: { polyfill: false },
    chunkSizeWarningLimit: 2000,
    reportCompressedSize: false,
  },
  plugins: [ship],
})
