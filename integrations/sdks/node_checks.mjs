// Checks in JavaScript, reported as checks.py reports: a line of JSON for each on standard output.
import assert from 'node:assert/strict'

const CHECK_LIMIT_MS = 90_000
const checks = []

export const QUESTION = [{ role: 'user', content: 'Why is the sky blue?' }]
export const WEATHER_QUESTION = 'What is the weather in Paris?'
export const WEATHER_SCHEMA = {
  type: 'object',
  properties: { city: { type: 'string', maxLength: 24 } },
  required: ['city'],
  additionalProperties: false,
}
export const CITY_SCHEMA = {
  type: 'object',
  properties: { name: { type: 'string', maxLength: 24 }, is_capital: { type: 'boolean' } },
  required: ['name', 'is_capital'],
  additionalProperties: false,
}

export function assertIsACity(city) {
  assert.deepEqual(Object.keys(city).sort(), ['is_capital', 'name'])
  assert.equal(typeof city.is_capital, 'boolean')
}

export function check(name, run, on = 'model') {
  checks.push({ name, run, on })
}

async function serverAt(url) {
  const models = await (await fetch(`${url}/v1/models`)).json()
  return { url, v1: `${url}/v1`, model: models.data[0].id }
}

export async function runChecks() {
  const urls = { model: process.env.HEADWATER_URL, scripted: process.env.HEADWATER_SCRIPTED_URL }
  const servers = {}
  for (const [name, url] of Object.entries(urls)) if (url) servers[name] = await serverAt(url)
  for (const { name, run, on } of checks) {
    const began = performance.now()
    let result = 'passed', reason = '', timer
    const late = new Promise((_, reject) => {
      timer = setTimeout(() => reject(new Error(`not done in ${CHECK_LIMIT_MS / 1000} s`)), CHECK_LIMIT_MS)
    })
    try {
      await Promise.race([run(servers[on]), late])
    } catch (error) {
      console.error(error)
      result = 'failed'
      reason = String(error.message ?? error).replace(/\s+/g, ' ').slice(0, 400)
    } finally {
      clearTimeout(timer)
    }
    const seconds = Math.round((performance.now() - began) / 10) / 100
    console.log(JSON.stringify({ check: name, on, result, reason, seconds }))
  }
  process.exit(0)
}
