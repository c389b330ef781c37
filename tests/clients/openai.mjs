// The official SDK: a plain response, a stream, embeddings, the list of models, and an error.
import OpenAI from 'openai'

const [url, key] = process.argv.slice(2)
const client = new OpenAI({ apiKey: key, baseURL: `${url}/v1`, maxRetries: 0 })
const messages = [{ role: 'user', content: 'hi' }]
const plain = await client.chat.completions.create({ model: 'gpt-4o', messages })
let streamed = ''
for await (const chunk of await client.chat.completions.create({ model: 'gpt-4o', messages, stream: true })) {
  streamed += chunk.choices[0]?.delta?.content ?? ''
}
const embeddings = await client.embeddings.create({ model: 'text-embedding-3-small', input: ['a', 'b'] })
const models = []
for await (const model of client.models.list()) models.push(model.id)
let error = null
try {
  await client.chat.completions.create({ model: 'unknown-model', messages })
} catch (caught) {
  error = { status: caught.status, name: caught.constructor.name }
}
console.log(JSON.stringify({
  plain: plain.choices[0].message.content,
  streamed,
  embeddings: embeddings.data.map((each) => each.embedding),
  models,
  error,
}))
