// Circles and H3 cells as polygons of the map. Longitudes go on beyond 180 where a shape crosses the antimeridian.

import { cellsToMultiPolygon, cellToBoundary, uncompactCells } from 'h3-js'
import type { Feature, Geometry, MultiLineString, Polygon, Position } from 'geojson'

/** H3's own sphere. */
const EARTH_KM = 6371.0088
const RAD = Math.PI / 180
const MERCATOR_LAT_MAX = 85.06

/** The points of a circle on the sphere, closed; a circle around a pole reaches the map's edge. */
export function circle(lat: number, lng: number, radiusKm: number, points = 160): Position[] {
  const angle = radiusKm / EARTH_KM
  const [sinLat, cosLat] = [Math.sin(lat * RAD), Math.cos(lat * RAD)]
  const ring: Position[] = []
  for (let index = 0; index < points; index += 1) {
    const bearing = (2 * Math.PI * index) / points
    const sinPoint = sinLat * Math.cos(angle) + cosLat * Math.sin(angle) * Math.cos(bearing)
    const east = Math.atan2(Math.sin(bearing) * Math.sin(angle) * cosLat, Math.cos(angle) - sinLat * sinPoint)
    ring.push([lng + east / RAD, Math.asin(Math.max(-1, Math.min(1, sinPoint))) / RAD])
  }
  const pole = (90 - Math.abs(lat)) * RAD < angle ? Math.sign(lat) || 1 : 0
  if (pole !== 0) {
    ring.sort((a, b) => (a[0] ?? 0) - (b[0] ?? 0))
    const edge = pole * MERCATOR_LAT_MAX
    const [first, last] = [ring[0]?.[1] ?? 0, ring.at(-1)?.[1] ?? 0]
    return [[lng - 180, edge], [lng - 180, first], ...ring, [lng + 180, last], [lng + 180, edge], [lng - 180, edge]]
  }
  ring.push(ring[0] ?? [lng, lat])
  return ring
}

/** A cell's corners, closed. */
export function cellRing(cell: string): Position[] {
  const ring = cellToBoundary(cell, true) as Position[]
  const lngs = ring.map((point) => point[0] ?? 0)
  if (Math.max(...lngs) - Math.min(...lngs) > 180) for (const point of ring) if ((point[0] ?? 0) < 0) point[0] = (point[0] ?? 0) + 360
  return ring
}

export function polygon(ring: Position[], properties: Record<string, unknown>): Feature<Polygon> {
  return { type: 'Feature', properties, geometry: { type: 'Polygon', coordinates: [ring] } }
}

/** The coast: land's outlines without where the map is cut, along the antimeridian and below Antarctica. */
export function coast(rings: Position[][]): MultiLineString {
  const lines: Position[][] = []
  const cut = (a: Position, b: Position): boolean =>
    (Math.abs(a[0] ?? 0) > 179.99 && Math.abs(b[0] ?? 0) > 179.99) || ((a[1] ?? 0) < -89.9 && (b[1] ?? 0) < -89.9)
  for (const ring of rings) {
    let line: Position[] = []
    ring.forEach((point, index) => {
      const before = ring[index - 1]
      if (before !== undefined && cut(before, point)) {
        if (line.length > 1) lines.push(line)
        line = []
      }
      line.push(point)
    })
    if (line.length > 1) lines.push(line)
  }
  return { type: 'MultiLineString', coordinates: lines }
}

/** Cells of one resolution, of compacted ones. */
export function uncompacted(cells: string[], resolution: number): string[] {
  return uncompactCells(cells, resolution)
}

/** The area of cells of one resolution as one shape: drawn one by one, they would overlap and leave slivers. */
export function union(cells: string[]): Geometry {
  const polygons = cellsToMultiPolygon(cells, true).map((loops) =>
    loops.map((loop) => {
      let before: number | undefined
      return loop.map(([lng = 0, lat = 0]): Position => {
        let along = lng
        if (before !== undefined) along += 360 * Math.round((before - lng) / 360)
        before = along
        return [along, lat]
      })
    }),
  )
  return { type: 'MultiPolygon', coordinates: polygons }
}
