// One client, in typical code, reads one stream; prints the text or the error.
import { createAzure } from '@ai-sdk/azure'
import { AzureChatOpenAI, ChatOpenAI } from '@langchain/openai'
import { streamText } from 'ai'
import OpenAI from 'openai'
import OpenAI4 from 'openai-4'

const [url, key, which] = process.argv.slice(2)
const messages = [{ role: 'user', content: 'hi' }]
const asked = { model: 'gpt-4o', messages, stream: true, stream_options: { include_usage: true } }

async function loop (SDK) {
  const client = new SDK({ apiKey: key, baseURL: `${url}/v1`, maxRetries: 0 })
  let text = ''
  for await (const chunk of await client.chat.completions.create(asked)) {
    if (chunk.usage) continue // OpenAI's documented chunk without choices
    text += chunk.choices[0].delta.content ?? ''
  }
  return text
}

async function langchain (model) {
  let text = ''
  for await (const chunk of await model.stream('hi')) text += chunk.content
  return text
}

const clients = {
  'openai 7': () => loop(OpenAI),
  'openai 4': () => loop(OpenAI4),
  async 'openai 4 helper' () {
    const client = new OpenAI4({ apiKey: key, baseURL: `${url}/v1`, maxRetries: 0 })
    return await client.beta.chat.completions.stream(asked).finalContent()
  },
  async '@ai-sdk/azure' () {
    const azure = createAzure({ apiKey: key, baseURL: `${url}/openai`, apiVersion: 'v1' })
    let failed = null
    const result = streamText({ model: azure.chat('gpt-4o'), prompt: 'hi', maxRetries: 0, onError: ({ error }) => { failed = error } })
    let text = ''
    for await (const part of result.textStream) text += part
    if (failed) throw failed
    return text
  },
  '@langchain/openai': () => langchain(new ChatOpenAI({ model: 'gpt-4o', apiKey: key, maxRetries: 0, configuration: { baseURL: `${url}/v1` } })),
  '@langchain/openai azure': () => langchain(new AzureChatOpenAI({
    model: 'gpt-4o', azureOpenAIApiKey: key, azureOpenAIApiVersion: '2024-10-21', maxRetries: 0,
    azureOpenAIApiDeploymentName: 'gpt-4o', azureOpenAIEndpoint: url
  }))
}
try {
  console.log(JSON.stringify({ text: await clients[which]() }))
} catch (error) {
  console.log(JSON.stringify({ error: `${error.name}: ${error.message}` }))
}
process.exit(0)
