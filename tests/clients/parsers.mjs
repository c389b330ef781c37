// Parsers that follow the standard: do they receive [DONE]?
import { createParser as newest } from 'eventsource-parser'
import { createParser as first } from 'eventsource-parser-1'

const [url, key] = process.argv.slice(2)
const response = await fetch(`${url}/v1/chat/completions`, {
  method: 'POST',
  headers: { 'content-type': 'application/json', authorization: `Bearer ${key}` },
  body: JSON.stringify({ model: 'gpt-4o', stream: true, messages: [{ role: 'user', content: 'hi' }] }),
})
const seen = { first: [], newest: [] }
const parsers = [
  first((event) => { if (event.type === 'event') seen.first.push(event.data) }),
  newest({ onEvent: (event) => seen.newest.push(event.data) }),
]
const decoder = new TextDecoder()
for await (const chunk of response.body) {
  const text = decoder.decode(chunk, { stream: true })
  for (const parser of parsers) parser.feed(text)
}
console.log(JSON.stringify({ first: seen.first.at(-1), newest: seen.newest.at(-1), count: seen.newest.length }))
