import assert from 'node:assert/strict'
import { createOpenAICompatible } from '@ai-sdk/openai-compatible'
import { generateObject, generateText, stepCountIs, streamText, tool } from 'ai'
import { z } from 'zod'
import { check, runChecks, WEATHER_QUESTION } from './node_checks.mjs'

const SKY = 'Why is the sky blue?'
const City = z.object({ name: z.string().max(24), is_capital: z.boolean() })
const modelOf = (server) => createOpenAICompatible({
  name: 'headwater', baseURL: server.v1, apiKey: 'unused', includeUsage: true, supportsStructuredOutputs: true,
})(server.model)
const fieldsOf = (server, more = {}) => ({
  model: modelOf(server), prompt: SKY, temperature: 0, maxOutputTokens: 24, maxRetries: 0, ...more,
})
const weatherTool = (execute) => tool({ description: 'The weather in a city', inputSchema: z.object({ city: z.string().max(24) }), execute })

check('chat', async (server) => {
  const { text, usage } = await generateText(fieldsOf(server))
  assert.ok(text)
  assert.equal(usage.outputTokens, 24)
})

check('stream', async (server) => {
  const result = streamText(fieldsOf(server))
  let text = ''
  for await (const part of result.textStream) text += part
  assert.equal(text, (await generateText(fieldsOf(server))).text)
  assert.equal((await result.usage).outputTokens, 24)
})

check('tools auto', async (server) => {
  const tools = { get_weather: weatherTool(async ({ city }) => `21 degrees in ${city}`) }
  const result = await generateText(fieldsOf(server, {
    prompt: WEATHER_QUESTION, tools, maxOutputTokens: 200, stopWhen: stepCountIs(3),
  }))
  assert.match(result.text, /21 degrees in Paris/)
  assert.equal(result.steps.length, 2)
}, 'scripted')

check('tools auto, streamed', async (server) => {
  const tools = { get_weather: weatherTool(async ({ city }) => `21 degrees in ${city}`) }
  const result = streamText(fieldsOf(server, {
    prompt: WEATHER_QUESTION, tools, maxOutputTokens: 200, stopWhen: stepCountIs(3),
  }))
  const kinds = new Set()
  for await (const part of result.fullStream) kinds.add(part.type)
  assert.ok(kinds.has('tool-input-delta') && kinds.has('tool-result'), [...kinds].join())
  assert.match(await result.text, /21 degrees in Paris/)
}, 'scripted')

check('tools required', async (server) => {
  const { toolCalls } = await generateText(fieldsOf(server, {
    tools: { get_weather: weatherTool() }, toolChoice: 'required', maxOutputTokens: 200,
  }))
  assert.deepEqual(Object.keys(toolCalls[0].input), ['city'])
})

check('tools named', async (server) => {
  const { toolCalls } = await generateText(fieldsOf(server, {
    tools: { get_weather: weatherTool() }, toolChoice: { type: 'tool', toolName: 'get_weather' }, maxOutputTokens: 200,
  }))
  assert.equal(toolCalls[0].toolName, 'get_weather')
})

check('json_schema', async (server) => {
  const { object } = await generateObject(fieldsOf(server, { schema: City, maxOutputTokens: 200 }))
  assert.equal(typeof object.is_capital, 'boolean')
})

check('errors', async (server) => {
  await assert.rejects(generateText(fieldsOf(server, { topP: 2 })), (error) => error.statusCode === 400 && /top_p/.test(error.message))
})

check('page', () => import('./page.mjs'))

await runChecks()
