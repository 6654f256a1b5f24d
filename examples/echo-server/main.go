// echo-server answers every HTTP request with one line that names its port.
//
// It knows nothing of Lictor: whoever reaches it through its sidecar was allowed to.
package main

import (
	"fmt"
	"log"
	"net/http"
	"os"
)

func main() {
	port := os.Getenv("PORT")
	if port == "" {
		port = "8080"
	}
	hello := fmt.Sprintf("Hello from echo-server on port %s!\n", port)
	handler := http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		fmt.Fprint(w, hello)
	})
	log.Printf("echo-server listens on port %s", port)
	// Loopback only: nobody but the sidecar should reach the app itself.
	log.Fatal(http.ListenAndServe("127.0.0.1:"+port, handler))
}
