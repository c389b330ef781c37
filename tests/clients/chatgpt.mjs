// The `chatgpt` package, as chatgpt-web uses it: it resolves only after [DONE].
import { ChatGPTAPI } from 'chatgpt'

const [url, key] = process.argv.slice(2)
const api = new ChatGPTAPI({ apiKey: key, apiBaseUrl: `${url}/v1`, completionParams: { model: 'gpt-4o' } })
let progress = 0
try {
  const answer = await api.sendMessage('hi', { timeoutMs: 3000, onProgress: () => { progress += 1 } })
  console.log(JSON.stringify({ text: answer.text, progress: progress > 0 }))
} catch (error) {
  console.log(JSON.stringify({ error: String(error.message), progress: progress > 0 }))
}
process.exit(0)
