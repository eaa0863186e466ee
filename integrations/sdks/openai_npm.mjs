import assert from 'node:assert/strict'
import OpenAI from 'openai'
import { assertIsACity, check, CITY_SCHEMA, QUESTION, runChecks, WEATHER_QUESTION, WEATHER_SCHEMA } from './node_checks.mjs'

const TOOL = { type: 'function', function: { name: 'get_weather', parameters: WEATHER_SCHEMA } }
const clientOf = (server) => new OpenAI({ baseURL: server.v1, apiKey: 'unused', maxRetries: 0, timeout: 80_000 })
const ask = (server, more = {}) => clientOf(server).chat.completions.create({
  model: server.model, messages: QUESTION, temperature: 0, max_completion_tokens: 24, ...more,
})

check('models', async (server) => {
  const { data } = await clientOf(server).models.list()
  assert.equal((await clientOf(server).models.retrieve(data[0].id)).id, data[0].id)
})

check('chat', async (server) => {
  const answer = await ask(server)
  assert.ok(answer.choices[0].message.content)
  assert.equal(answer.usage.completion_tokens, 24)
})

check('stream', async (server) => {
  let text = '', usage
  for await (const chunk of await ask(server, { stream: true, stream_options: { include_usage: true } })) {
    text += chunk.choices[0]?.delta?.content ?? ''
    usage = chunk.usage ?? usage
  }
  assert.equal(text, (await ask(server)).choices[0].message.content)
  assert.equal(usage.completion_tokens, 24)
})

check('tools auto', async (server) => {
  const messages = [{ role: 'user', content: WEATHER_QUESTION }]
  const more = { tools: [TOOL], max_completion_tokens: 200 }
  const answer = await ask(server, { messages, ...more })
  assert.equal(answer.choices[0].finish_reason, 'tool_calls')
  const [call] = answer.choices[0].message.tool_calls
  assert.deepEqual(JSON.parse(call.function.arguments), { city: 'Paris' })
  messages.push(answer.choices[0].message, { role: 'tool', tool_call_id: call.id, content: '21 degrees' })
  assert.match((await ask(server, { messages, ...more })).choices[0].message.content, /21 degrees/)
}, 'scripted')

check('tools run by the helper', async (server) => {
  const runner = clientOf(server).chat.completions.runTools({
    model: server.model,
    messages: [{ role: 'user', content: WEATHER_QUESTION }],
    tools: [{
      type: 'function',
      function: { name: 'get_weather', parameters: WEATHER_SCHEMA, parse: JSON.parse, function: ({ city }) => `21 degrees in ${city}` },
    }],
  })
  assert.match(await runner.finalContent(), /21 degrees in Paris/)
}, 'scripted')

check('tools required', async (server) => {
  const answer = await ask(server, { tools: [TOOL], tool_choice: 'required', max_completion_tokens: 200 })
  assert.deepEqual(Object.keys(JSON.parse(answer.choices[0].message.tool_calls[0].function.arguments)), ['city'])
})

check('tools named', async (server) => {
  const tool_choice = { type: 'function', function: { name: 'get_weather' } }
  const stream = clientOf(server).chat.completions.stream({
    model: server.model, messages: QUESTION, tools: [TOOL], tool_choice, max_completion_tokens: 200, temperature: 0,
  })
  const [call] = (await stream.finalChatCompletion()).choices[0].message.tool_calls
  assert.equal(call.function.name, 'get_weather')
  assert.deepEqual(Object.keys(JSON.parse(call.function.arguments)), ['city'])
})

check('json_schema', async (server) => {
  const response_format = { type: 'json_schema', json_schema: { name: 'city', strict: true, schema: CITY_SCHEMA } }
  const answer = await ask(server, { response_format, max_completion_tokens: 200 })
  assertIsACity(JSON.parse(answer.choices[0].message.content))
})

check('logprobs', async (server) => {
  const answer = await ask(server, { logprobs: true, top_logprobs: 2, max_completion_tokens: 6 })
  assert.equal(answer.choices[0].logprobs.content.length, 6)
})

check('responses', async (server) => {
  const answer = await clientOf(server).responses.create({
    model: server.model, input: 'Why is the sky blue?', max_output_tokens: 16,
  })
  assert.ok(answer.output_text)
})

check('errors', async (server) => {
  await assert.rejects(ask(server, { model: 'none' }), (error) => error instanceof OpenAI.NotFoundError)
  await assert.rejects(ask(server, { top_p: 2 }), (error) => error instanceof OpenAI.BadRequestError && /top_p/.test(error.message))
})

check('page', () => import('./page.mjs'))

await runChecks()
